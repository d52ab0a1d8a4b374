"""The demo CLIP of `surgery/demo_clip`, trained from scratch on the world of `datamodules._drawing`.

One symmetric contrastive loss over images and their captions, nothing else: no labels, no masks, no
pretrained part. The difficulty of the world rises as the model learns to name what it sees; bright
ground comes in a run of its own, for rising to it at once left, after 3,500 steps, an mAP of 0.66
and 1.3 times raw CLIP's mIoU with surgery, where the two runs get 0.92 and 1.7 times. The commands are
in `__main__`.
"""
