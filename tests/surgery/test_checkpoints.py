"""Weights in every format, and files that are refused."""

import os
import pickle
import re
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.files import file_digest
from surgery import load_backbone
from surgery.checkpoints import CheckpointError, read_checkpoint


class Node(nn.Module):
    """A module made of a state dict, so that names are as in OpenAI's archives."""

    def __init__(self, weights):
        super().__init__()
        children = {}
        for name, value in weights.items():
            head, _, rest = name.partition(".")
            if rest:
                children.setdefault(head, {})[rest] = value
            elif value.is_floating_point():
                self.register_parameter(head, nn.Parameter(value, requires_grad=False))
            else:
                self.register_buffer(head, value)
        for name, inner in children.items():
            self.add_module(name, Node(inner))

    def forward(self, x):
        return x * self.logit_scale


def archive(path, weights):
    extra = {name: torch.tensor(77) for name in ("input_resolution", "context_length")}
    module = Node({**weights, **extra, "vocab_size": torch.tensor(600)})
    torch.jit.trace(module, torch.ones(1)).save(path)


class Touch:
    """Unpickling it runs code: it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def tokens(backbone, reference):
    return backbone.encode_image(reference("inputs")["images_vit"]).patch_tokens


@pytest.mark.parametrize("half", [False, True], ids=["float32", "as_published"])
@pytest.mark.parametrize("kind", ["safetensors", "state_dict", "legacy", "training", "archive"])
def test_every_format(kind, half, weights, config, folder, tmp_path, reference):
    if half:
        weights = load_file(folder / "vit.safetensors")
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file(weights, path)
    elif kind == "archive":
        archive(path, weights)
    elif kind == "training":
        prefixed = {f"module.{name}": value for name, value in weights.items()}
        optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]}
        content = {"epoch": 3, "name": "x", "state_dict": prefixed, "optimizer": optimizer}
        torch.save(content, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind != "legacy")
    backbone = load_backbone(config, str(path))
    assert all(value.dtype != torch.float16 for value in backbone.state_dict().values())
    expected = reference("vit")["image_tokens_cs"][:, 1:]
    torch.testing.assert_close(tokens(backbone, reference), expected, rtol=0, atol=2e-5)
    assert backbone.checkpoint.path == str(path)
    assert backbone.checkpoint.sha256 == file_digest(path)


def test_archive_equals_what_torch_reads(weights, tmp_path):
    weights["visual.conv1.weight"] = weights["visual.conv1.weight"].to(torch.bfloat16)
    archive(tmp_path / "model.pt", weights)
    read = read_checkpoint(tmp_path / "model.pt")
    assert read.openai
    assert read.weights.keys() == weights.keys()
    for name, value in weights.items():
        assert read.weights[name].dtype == value.dtype
        assert torch.equal(read.weights[name], value), name


def test_quick_gelu_follows_weights_config_and_wish(weights, config, tmp_path, folder):
    import json

    plain = json.loads((folder / "vit.json").read_text()) | {"quick_gelu": False}
    wrapped = tmp_path / "open_clip_config.json"
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    wrapped.write_text(json.dumps({"model_cfg": plain, "preprocess_cfg": preprocess}))
    archive(tmp_path / "model.pt", weights)
    torch.save(weights, tmp_path / "state.pt")
    for path, wish, expected in (
        ("model.pt", None, "QuickGELU"),
        ("model.pt", False, "GELU"),
        ("state.pt", None, "GELU"),
        ("state.pt", True, "QuickGELU"),
    ):
        backbone = load_backbone(str(wrapped), str(tmp_path / path), quick_gelu=wish)
        for tower in (backbone.model.visual, backbone.model):
            assert type(tower.transformer.resblocks[0].mlp.gelu).__name__ == expected
    assert (backbone.mean, backbone.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert type(load_backbone(config).model.visual.transformer.resblocks[0].mlp.gelu).__name__ == (
        "QuickGELU"
    )


@pytest.mark.parametrize(
    ("model", "file", "warned"),
    [
        ("ViT-L-14-336", "mine.pt", "openai"),  # the only weights that were ever published of it
        ("RN50x4", "mine.pt", "openai"),
        ("ViT-B-16", "mine.pt", None),  # some were trained with GELU: nothing is known
        ("ViT-B-16", "vit_b16_dfn2b.pt", "dfn2b"),
        ("ViT-B-16", "laion2b_s34b_b88k.pt", None),
        ("ViT-L-14-336-quickgelu", "mine.pt", None),
    ],
)
def test_an_activation_that_does_not_fit_is_named(
    model, file, warned, weights, folder, tmp_path, monkeypatch, caplog
):
    import json

    import open_clip

    config = json.loads((folder / "vit.json").read_text())
    config["quick_gelu"] = model.endswith("quickgelu")
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    torch.save(weights, tmp_path / file)
    load_backbone(model, tmp_path / file)
    said = [r.getMessage() for r in caplog.records if "does not say with which" in r.getMessage()]
    assert len(said) == (warned is not None)
    assert all(f"({warned})" in line and model in line for line in said)
    caplog.clear()
    load_backbone(model, tmp_path / file, quick_gelu=True)  # whoever says so is believed
    assert "activation" not in caplog.text


@pytest.mark.parametrize("whole", ["module", "nested", "plain_pickle"])
def test_pickles_are_refused_and_never_run(whole, config, tmp_path):
    path, trap = tmp_path / "model.pt", tmp_path / "trap"
    if whole == "module":
        torch.save(nn.Linear(2, 2), path)
    elif whole == "nested":
        torch.save({"state_dict": {"a": torch.zeros(1), "b": Touch(trap)}}, path)
    else:
        path.write_bytes(pickle.dumps(Touch(trap)))
    with pytest.raises(CheckpointError, match=r"model.pt: refused.*torch.save\(model.state_dict"):
        load_backbone(config, str(path))
    assert not trap.exists()


def test_archive_with_a_trap_is_refused(weights, tmp_path):
    archive(tmp_path / "good.pt", weights)
    trap, bad = tmp_path / "trap", tmp_path / "bad.pt"
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(bad, "w") as out:
        for name in good.namelist():
            content = good.read(name)
            if name.count("/") == 1 and name.endswith("/data.pkl"):
                content = pickle.dumps(Touch(trap), protocol=2)
            out.writestr(name, content)
    with pytest.raises(CheckpointError, match=r"bad.pt: refused.*names (posix|nt).mkdir"):
        read_checkpoint(bad)
    assert not trap.exists()


def test_code_in_an_archive_is_not_even_read(weights, tmp_path):
    archive(tmp_path / "good.pt", weights)
    broken = tmp_path / "broken.pt"
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(broken, "w") as out:
        for name in good.namelist():
            out.writestr(name, b"not python" if "/code/" in name else good.read(name))
    assert read_checkpoint(broken).weights.keys() == weights.keys()


@pytest.mark.parametrize("scripted", [True, False])
def test_an_archive_can_not_inflate(scripted, weights, tmp_path):
    """A few megabytes of packed zeros would be gigabytes of weights."""
    good, bomb = tmp_path / "good.pt", tmp_path / "bomb.pt"
    if scripted:
        archive(good, weights)
    else:
        torch.save(weights, good)
    with (
        zipfile.ZipFile(good) as source,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out,
    ):
        for name in source.namelist():
            out.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match=r"bomb.pt: refused.*is compressed"):
        read_checkpoint(bomb)


def test_a_tensor_larger_than_what_is_stored(tmp_path):
    torch.save({"a": torch.zeros(1).expand(1 << 50)}, tmp_path / "wide.pt")
    with pytest.raises(CheckpointError, match=r"wide.pt: 'a' claims more numbers"):
        read_checkpoint(tmp_path / "wide.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, weights, config, tmp_path):
    weights["ln_final.weight"][5] = value
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"w\.safetensors.*not finite.*'ln_final.weight'"):
        load_backbone(config, str(tmp_path / "w.safetensors"))


def test_weights_of_another_model(weights, folder, config, tmp_path):
    with pytest.raises(CheckpointError, match=r"rn\.safetensors.*keys missing.*keys unexpected"):
        load_backbone(config, str(folder / "rn.safetensors"))
    mobile = "image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight"  # MobileCLIP's
    torch.save({**weights, mobile: torch.zeros(1)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"m\.pt.*1 keys unexpected \(image_encoder"):
        load_backbone(config, str(tmp_path / "m.pt"))
    weights["visual.proj"] = torch.zeros(128, 32)
    save_file(weights, tmp_path / "w.safetensors")
    message = r"visual.proj: expected \[128, 64\], given \[128, 32\]"
    with pytest.raises(CheckpointError, match=message):
        load_backbone(config, str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"text, not weights", b"\x08\0\0\0\0\0\0\0{]}{]}{]"])
def test_files_that_are_no_weights(name, content, config, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load_backbone(config, str(tmp_path / name))


def test_rows_of_a_vocabulary_stand_for_all_of_it(weights, config, tmp_path, reference):
    table = weights["token_embedding.weight"]
    table[[0, 5, 99]] = 0
    save_file(weights, tmp_path / "whole.safetensors")
    ids = table.any(dim=1).nonzero()[:, 0]
    del weights["token_embedding.weight"]
    rows = {"token_embedding.rows": table[ids], "token_embedding.ids": ids}
    save_file({**weights, **rows}, tmp_path / "rows.safetensors")
    whole, small = (load_backbone(config, tmp_path / f"{n}.safetensors") for n in ("whole", "rows"))
    assert whole.fingerprint() == small.fingerprint()
    for change in (
        {"token_embedding.ids": ids - 2},
        {"token_embedding.ids": ids + 5},
        {"token_embedding.ids": ids * 0 + 1},
        {"token_embedding.ids": ids[1:]},
        {"token_embedding.ids": ids.int()},
        {"token_embedding.rows": rows["token_embedding.rows"][:, 1:].contiguous()},
    ):
        save_file({**weights, **rows, **change}, tmp_path / "rows.safetensors")
        with pytest.raises(CheckpointError, match=r"rows\.safetensors: .* rows of a table of 600"):
            load_backbone(config, tmp_path / "rows.safetensors")


def test_truncated_files(weights, config, tmp_path):
    archive(tmp_path / "archive.pt", weights)
    torch.save(weights, tmp_path / "state.pt")
    save_file(weights, tmp_path / "w.safetensors")
    for path in list(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(CheckpointError, match=path.name):
            load_backbone(config, str(path))


class Kind(torch.Tensor):
    """A class of tensors that torch itself would not load."""


def odd_tensors():
    zeros = torch.zeros(64)
    with torch.device("meta"):
        meta = torch.zeros(64)
    return {
        "meta": (meta, "without values"),
        "sparse": (zeros.to_sparse(), "a sparse tensor"),
        "sparse rows": (torch.eye(64).to_sparse_csr(), "a sparse tensor"),
        "nested": (torch.nested.nested_tensor([zeros, zeros[:3]]), "refused"),
        "quantised": (
            torch.quantize_per_tensor(zeros, 0.1, 0, torch.quint8),
            "quantised (torch.quint8)",
        ),
        "complex": (zeros.to(torch.complex64), "that weights don't have (torch.complex64)"),
        "eight bits": (zeros.to(torch.float8_e4m3fn), "that weights don't have (torch.float8"),
        "integers": (zeros.long(), "expected floats, given torch.int64"),
        "expanded": (torch.zeros(1).expand(10**12), "claims more numbers"),
        "not finite": (zeros.double() / 0, "not finite"),
        "another shape": (torch.zeros(0), "expected [64], given [0]"),
        "no tensor": ({"weight": zeros}, "not tensors in its state dict"),
        "a subclass": (zeros.as_subclass(Kind), "refused"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", odd_tensors())
def test_tensors_that_are_no_weights(name, weights, config, tmp_path):
    value, message = odd_tensors()[name]
    torch.save({**weights, "ln_final.weight": value}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=rf"odd\.pt.*{re.escape(message)}") as error:
        load_backbone(config, str(tmp_path / "odd.pt"))
    assert "ln_final.weight" in str(error.value) or message == "refused"


@pytest.mark.parametrize("key", [7, b"ln_final.weight", None, ("a", 1)])
def test_names_that_are_no_texts(key, weights, config, tmp_path):
    for content in ({**weights, key: weights["ln_final.weight"]}, {key: torch.zeros(1)}):
        torch.save({"state_dict": content}, tmp_path / "odd.pt")
        with pytest.raises(CheckpointError, match=r"odd\.pt: names in a state dict are texts"):
            load_backbone(config, str(tmp_path / "odd.pt"))


@pytest.mark.parametrize("content", [[], {}, 3, "text", torch.zeros(2), {"state_dict": {}}])
def test_what_is_no_state_dict(content, config, tmp_path):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"odd\.pt: expected a state dict"):
        load_backbone(config, str(tmp_path / "odd.pt"))
