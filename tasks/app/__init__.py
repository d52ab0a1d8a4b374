"""The app: a page on this machine to look at pictures with. Only `page` knows gradio."""
