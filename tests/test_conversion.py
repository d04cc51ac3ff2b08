"""The published formats become adapters; nothing in a file is executed or believed."""

import json
import logging
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, logits, tiny_model, token_ids

from peft_edit import convert_hpr, convert_sea
from peft_edit.tuners.hpr import HPRLayer
from peft_edit.tuners.hpr.maths import edit as hpr_edit
from peft_edit.tuners.sea import SEALayer, tensor_file


FIXTURES = Path(__file__).parent / "fixtures"
SEA, HPR = FIXTURES / "sea_ref_artifact", FIXTURES / "hpr_ref_artifact"
D = 64
POSITIVE, NEGATIVE = "no_mean_sub_uu_positive.pt", "no_mean_sub_uu_negative.pt"
RANKS = [[12, 12], [8, 8], [9, 9]]
GOLDEN_HPR = load_file(FIXTURES / "hpr_edit.safetensors")


def base(path, layers, family="llama", d=D):
    """A folder of a model's configuration, without weights."""
    config = CONFIGS[family]()
    config.update({"hidden_size": d, "num_hidden_layers": layers})
    config.save_pretrained(path)
    return path


@pytest.fixture
def three(tmp_path):
    return base(tmp_path / "three", 3)


@pytest.fixture
def four(tmp_path):
    return base(tmp_path / "four", 4)


@pytest.fixture
def source(tmp_path):
    return Path(shutil.copytree(SEA, tmp_path / "source"))


@pytest.fixture
def guidance(tmp_path):
    return Path(shutil.copytree(HPR, tmp_path / "guidance"))


def loaded(folder, layers=3, family="llama"):
    """The adapter on a model with weights, its layers by index."""
    changes = {"hidden_size": D, "num_hidden_layers": layers}
    model = PeftModel.from_pretrained(tiny_model(family, **changes), folder)
    kinds = (SEALayer, HPRLayer)
    return model, [module for module in model.modules() if isinstance(module, kinds)]


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sea_gives_the_published_projections(tmp_path, family):
    folder = base(tmp_path / "base", 3, family)
    conversion = convert_sea(SEA, tmp_path / "out", base_model=folder)
    assert conversion.layers == [0, 1, 2] and conversion.ranks == RANKS and conversion.deviation < 1e-6
    model, layers = loaded(tmp_path / "out", family=family)
    config = model.active_peft_config
    assert config.base_model_name_or_path == str(folder) and config.base_model_fingerprint is None
    assert (config.positive_energy, config.negative_energy, config.centered) == (0.998, 0.998, False)
    positive, negative = (torch.load(SEA / name, weights_only=True) for name in (POSITIVE, NEGATIVE))
    h = torch.randn(7, D, generator=torch.Generator().manual_seed(0))
    for i, layer in enumerate(layers):
        y = h @ positive[i] + h @ negative[i]
        expected = y * h.norm(dim=1, keepdim=True) / y.norm(dim=1, keepdim=True)
        torch.testing.assert_close(layer.edit(h, "default"), expected, rtol=0, atol=1e-5)


def test_sea_layers_and_rescale(tmp_path, three):
    conversion = convert_sea(SEA, tmp_path / "out", base_model=three, layers=range(1, 3), rescale="none")
    assert conversion.layers == [1, 2] and conversion.ranks == RANKS[1:]
    model, layers = loaded(tmp_path / "out")
    assert [layer.site for layer in layers] == [f"model.layers.{i}.mlp.down_proj" for i in (1, 2)]
    with torch.no_grad():
        edited = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), edited, rtol=0, atol=1e-5)


def test_sea_is_loaded_as_any_adapter(tmp_path):
    tiny_model(hidden_size=D).save_pretrained(tmp_path / "base")
    convert_sea(SEA, tmp_path / "out", base_model=tmp_path / "base")
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=token_ids())


def test_what_differs_is_told(tmp_path, three, source, caplog):
    with caplog.at_level(logging.WARNING, "peft_edit.adapters.conversion"):
        conversion = convert_sea(SEA, tmp_path / "out", base_model=three)
    assert [record.getMessage() for record in caplog.records] == conversion.notes
    told = "\n".join(conversion.notes)
    for part in (
        "outputs of decoder blocks",
        "norm over all tokens",
        "neither merges nor exports",
        "all 3 layers edit",
    ):
        assert part in told
    assert "mean over features" not in told

    for name in (POSITIVE, NEGATIVE):
        (source / name).rename(source / name.removeprefix("no_mean_sub_"))
    told = "\n".join(convert_sea(source, tmp_path / "out", base_model=three, layers=1, rescale="none").notes)
    assert "lack the prefix no_mean_sub_: they were fitted after subtracting each sample's mean over features" in told
    assert "norms are not kept" in told and "layers edit" not in told and "exports" not in told


@pytest.mark.parametrize("name", ["tanh", "Squared-Exponential", "elu"])
def test_sea_with_a_feature_map(tmp_path, three, source, name):
    change(source / "sea-args.json", feature_function=name, positive_k_ratio=0.9)
    notes = convert_sea(source, tmp_path / "out", base_model=three).notes
    config = loaded(tmp_path / "out")[0].active_peft_config
    assert config.feature_map == name.lower().replace("-", "_") and config.positive_energy == 0.9
    assert any(f"inverse of the feature map '{config.feature_map}' alone" in note for note in notes)


def test_sea_without_the_json_files(tmp_path, three, source):
    for name in ("sea-args.json", "sea-statistics.json"):
        (source / name).unlink()
    assert convert_sea(source, tmp_path / "out", base_model=three).ranks == RANKS


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_sea_in_other_precisions(tmp_path, three, source, dtype):
    for name in (POSITIVE, NEGATIVE):
        torch.save(torch.load(source / name, weights_only=True).to(dtype), source / name)
    assert convert_sea(source, tmp_path / "out", base_model=three).ranks == RANKS
    loaded(tmp_path / "out")[0](input_ids=token_ids())


@pytest.mark.parametrize("rank", [0, D])
def test_sea_with_nothing_or_everything(tmp_path, three, source, rank):
    (source / "sea-statistics.json").unlink()
    torch.save((torch.eye(D) if rank else torch.zeros(D, D)).repeat(3, 1, 1), source / POSITIVE)
    assert [ranks[0] for ranks in convert_sea(source, tmp_path / "out", base_model=three).ranks] == [rank] * 3
    loaded(tmp_path / "out")[0](input_ids=token_ids())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def stack():
    return torch.load(SEA / POSITIVE, weights_only=True)


def rewrite(path, change, **options):
    """Write an archive again with changed entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in change(entries).items():
            archive.writestr(name, data)


def protocol_four(entries):
    # As PICKLE_OPCODES allow, but a class by STACK_GLOBAL.
    name = next(n for n in entries if n.endswith("data.pkl"))
    return {**entries, name: pickle.dumps(Evil(Path("evil")), protocol=4)}


def endless_hash(start, end):
    """A key that takes 2^60 steps to hash: a tuple each of whose levels holds the one below twice."""
    levels = b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))

    def change(entries):
        name = next(n for n in entries if n.endswith("data.pkl"))
        return {**entries, name: b"\x80\x02" + start + b")" + levels + end}

    return change


def other_size(entries):
    name = next(n for n in entries if n.endswith("data.pkl"))
    claimed = entries[name].replace(b"M\x00\x30", b"J\x00\x00\x00\x7f")  # numel
    assert claimed != entries[name]
    return {**entries, name: claimed}


def expanded(path):
    torch.save(torch.zeros(1, 1, 1).expand(3, D, D), path)


REFUSED = {
    "code": (
        lambda p: torch.save(Evil(p.parent / "evil"), p),
        "else than one tensor.*: refused, nothing in it was executed",
    ),
    "code beside a tensor": (
        lambda p: torch.save([stack(), Evil(p.parent / "evil")], p),
        "else than one tensor.*: refused, nothing in it was executed",
    ),
    "another way to code": (lambda p: rewrite(p, protocol_four), "nothing in it was executed"),
    "a list": (lambda p: torch.save([stack()], p), "else than one tensor"),
    "a dict": (lambda p: torch.save({"uu": stack()}, p), "else than one tensor"),
    "a number": (lambda p: torch.save(3, p), "else than one tensor: refused"),
    "endless hash of a dict": (lambda p: rewrite(p, endless_hash(b"}", b"K\x01s.")), "else than one tensor: refused"),
    "endless hash of an argument": (
        lambda p: rewrite(p, endless_hash(b"ccollections\nOrderedDict\n", b"K\x01\x86\x85\x85R.")),
        "else than one tensor .collections OrderedDict",
    ),
    "integers": (lambda p: torch.save(stack().long(), p), r"else than one tensor \(torch LongStorage\)"),
    "large pickle": (
        lambda p: rewrite(p, lambda e: {n: d + bytes(9999) if n.endswith(".pkl") else d for n, d in e.items()}),
        "one tensor and nothing else",
    ),
    "compressed": (lambda p: rewrite(p, dict, compression=zipfile.ZIP_DEFLATED), "unpacks to more than it holds"),
    "other size claimed": (lambda p: rewrite(p, other_size), "cannot be read as a tensor|claims another size"),
    "expanded": (expanded, "claims another size than it has"),
    "part of a larger tensor": (lambda p: torch.save(torch.zeros(6, D, D)[:3], p), "claims another size than it has"),
    "another hidden size": (lambda p: torch.save(torch.zeros(3, 8, 8), p), r"of shape \(3, 8, 8\); .* hidden size 64"),
    "other layers": (lambda p: torch.save(torch.zeros(4, D, D), p), r"of shape \(4, 64, 64\); .*three has 3 layers"),
    "one layer": (lambda p: torch.save(torch.zeros(D, D), p), r"of shape \(64, 64\)"),
    "too large": (
        lambda p: p.write_bytes(bytes(2 * 2**20)),
        "has 2097152 bytes, at most 1146880 are",
    ),
    "old format": (
        lambda p: torch.save(stack(), p, _use_new_zipfile_serialization=False),
        "not written by torch.save: File is not a zip file",
    ),
    "text": (lambda p: p.write_text("no tensor"), "not written by torch.save"),
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:30000]), "is damaged"),
    "empty": (lambda p: p.write_bytes(b""), "is damaged"),
    "NaN": (lambda p: torch.save(stack().fill_(float("nan")), p), "layer 0 holds NaN or infinite values"),
    "no projection": (lambda p: torch.save(stack() * 1.5, p), "layer 0 is no orthogonal projection: it deviates by 0."),
    "another fit": (lambda p: torch.save(stack().flip(0), p), "says rank 12 for layer 0 .*, the projection has 9"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_files_that_are_refused(tmp_path, three, source, what, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = REFUSED[what]
    make(source / POSITIVE)
    with pytest.raises(ValueError, match=message) as refusal:
        convert_sea(source, tmp_path / "out", base_model=three)
    assert POSITIVE in str(refusal.value) or what == "another fit"
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600
    assert not (tmp_path / "out").exists() and not (source / "evil").exists() and not Path("evil").exists()


def test_a_bomb_is_neither_unpacked_nor_loaded(tmp_path, three, source, monkeypatch):
    with zipfile.ZipFile(source / POSITIVE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"0" * 2**26)
    read = []
    monkeypatch.setattr(tensor_file.torch, "load", lambda *args, **kwargs: read.append(args))
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *args, **kwargs: read.append(args))
    with pytest.raises(ValueError, match="unpacks to more than it holds"):
        convert_sea(source, tmp_path / "out", base_model=three)
    assert read == []


def test_a_matrix_that_is_damaged_in_a_later_layer(tmp_path, three, source):
    matrices = torch.load(source / NEGATIVE, weights_only=True)
    matrices[2, 0, 1] += 0.5
    torch.save(matrices, source / NEGATIVE)
    with pytest.raises(ValueError, match=rf"{NEGATIVE}, layer 2 is no orthogonal projection: it deviates by 0\.\d+"):
        convert_sea(source, tmp_path / "out", base_model=three)
    convert_sea(source, tmp_path / "out", base_model=three, layers=[0, 1])  # which does not need it


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda s: (s / POSITIVE).unlink(), {}, f"has no {POSITIVE}: both files"),
        (
            lambda s: [p.unlink() for p in s.glob("*.pt")],
            {},
            "holds no fit: it must hold uu_positive.pt and",
        ),
        (lambda s: shutil.copy(s / POSITIVE, s / "uu_positive.pt"), {}, "holds two fits"),
        (lambda s: (s / "sea-args.json").write_text("{"), {}, "sea-args.json is damaged"),
        (lambda s: (s / "sea-statistics.json").write_text("[]"), {}, "must hold an object, got list"),
        (lambda s: change(s / "sea-args.json", feature_function="sine"), {}, "feature_map must be one of .*'sine'"),
        (lambda s: change(s / "sea-args.json", positive_k_ratio=99.8), {}, "positive_energy must be in"),
        (lambda s: None, {"rescale": "mean"}, "rescale must be one of 'token', 'none', 'average', got 'mean'"),
        (lambda s: None, {"layers": [3]}, "has layers 0 to 2, got 3"),
    ],
)
def test_bad_input_of_sea(tmp_path, three, source, spoil, options, message):
    spoil(source)
    with pytest.raises(ValueError, match=message):
        convert_sea(source, tmp_path / "out", base_model=three, **options)
    assert not (tmp_path / "out").exists()


def test_hpr_gives_the_published_modules(tmp_path, four):
    conversion = convert_hpr(HPR, tmp_path / "out", base_model=four)
    assert conversion.layers == [0, 1, 2, 3] and any("all 4 edit" in note for note in conversion.notes)
    model, layers = loaded(tmp_path / "out", layers=4)
    config = model.active_peft_config
    assert (config.gate, config.alpha, config.rotation, config.token_scope) == (0.5, 1.0, "angle", "all")
    published = load_file(HPR / "guidance.safetensors")
    a = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    for i, layer in enumerate(layers):
        x = a
        for j in (0, 2, 4, 6):
            weight, bias = (published[f"{i}.angle_model.model.{j}.{name}"] for name in ("weight", "bias"))
            x = torch.nn.functional.linear(torch.nn.functional.gelu(x) if j else x, weight, bias)
        angle = torch.pi * torch.sigmoid(x.squeeze(1))
        negative = a @ published[f"{i}.lr_model.weight"][0] <= 0
        expected = hpr_edit(a, published[f"{i}.lr_model.weight"][0], lambda _, angle=angle[negative]: angle)
        torch.testing.assert_close(layer.edit(a, "default"), expected)


def test_hpr_edits_as_the_published_code(tmp_path, guidance):
    """The golden output of the published code, float64, by a converted adapter."""
    folder = base(tmp_path / "base", 1)
    state = {
        f"0.{name.removeprefix('state.')}": tensor.float()
        for name, tensor in GOLDEN_HPR.items()
        if "lr_model" in name or "angle_model" in name
    }
    save_file(state, guidance / "guidance.safetensors")
    change(guidance / "guidance_config.json", target_layers=[0], base_model_num_hidden_layers=1)
    convert_hpr(guidance, tmp_path / "out", base_model=folder)
    _, (layer,) = loaded(tmp_path / "out", layers=1)
    expected = GOLDEN_HPR["out.f64.alpha1.0"]
    torch.testing.assert_close(
        layer.edit(GOLDEN_HPR["activation"].float(), "default"), expected.float(), rtol=0, atol=1e-5
    )


def test_hpr_with_selected_layers(tmp_path, four, guidance):
    (guidance / "guidance_config_selected.json").replace(guidance / "guidance_config.json")
    conversion = convert_hpr(guidance, tmp_path / "out", base_model=four)
    assert conversion.layers == [1, 2] and not any("edit;" in note for note in conversion.notes)
    model, layers = loaded(tmp_path / "out", layers=4)
    config = model.active_peft_config
    assert [layer.index for layer in layers] == config.selected_layers == [1, 2]
    assert config.probe_accuracy == {"1": 0.88, "2": 0.91} and config.layers_to_transform == [0, 1, 2, 3]
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.split(".layers.")[1][0] for name in names} == {"1", "2"}


def test_hpr_of_another_width_names_its_model(tmp_path, four, guidance):
    change(guidance / "guidance_config.json", num_guidance_module_layers=2, guidance_hidden_size=16, target_layers=[2])
    change(guidance / "guidance_config.json", base_model_name_or_path="meta-llama/Llama-2-7b-chat-hf")
    shapes = {"lr_model.weight": (1, D), "angle_model.model.0.weight": (16, D), "angle_model.model.0.bias": (16,)}
    shapes |= {"angle_model.model.2.weight": (1, 16), "angle_model.model.2.bias": (1,)}
    save_file({f"2.{name}": torch.ones(shape) for name, shape in shapes.items()}, guidance / "guidance.safetensors")
    conversion = convert_hpr(guidance, tmp_path / "out", base_model=four)
    assert conversion.layers == [2] and "model meta-llama/Llama-2-7b-chat-hf, not" in conversion.notes[-1]


def tensors(folder, change):
    path = folder / "guidance.safetensors"
    found = load_file(path)
    change(found)
    save_file(found, path)


def of(**values):
    return lambda folder: change(folder / "guidance_config.json", **values)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda g: (g / "guidance_config.json").unlink(), "has no guidance_config.json"),
        (lambda g: (g / "guidance.safetensors").unlink(), "has no guidance.safetensors: both files"),
        (lambda g: (g / "guidance.safetensors").write_bytes(b"xxxxxxxxxx"), "guidance.safetensors is damaged"),
        (lambda g: (g / "guidance_config.json").write_text("no"), "guidance_config.json is damaged"),
        (of(guidance_module_type="iti"), "guidance modules of type iti, only 'householder' is HPR"),
        (of(base_model_hidden_size=32), "is of a model with hidden_size 32, .*four has 64"),
        (of(base_model_num_hidden_layers=32), "is of a model with num_hidden_layers 32, .*four has 4"),
        (of(target_layers=[0, 4]), r"names layers \[4\], .*four has 4"),
        (of(target_layers="all"), "has no lists of layers"),
        (of(selected_layers={"x": 1}), "has no lists of layers"),
        (of(target_layers=[0, 1]), "has more than the guidance modules: 2.angle_model"),
        (
            of(num_guidance_module_layers=3),
            "more than the guidance modules: 0.angle_model.model.6",
        ),
        (of(guidance_hidden_size=8), r"has shape \(32,?.*\), by guidance_config.json it is \(8"),
        (of(num_guidance_module_layers=10**9), "has num_guidance_module_layers 1000000000, for which .* is too small"),
        (of(guidance_hidden_size=10**9), "has guidance_hidden_size 1000000000, for which .* is too small"),
        (of(num_guidance_module_layers="4"), "num_angle_layers must be an integer"),
        (lambda g: tensors(g, lambda t: t.pop("1.lr_model.weight")), "lacks 1.lr_model.weight"),
        (lambda g: tensors(g, lambda t: t.update(extra=torch.ones(1))), "has more than the guidance modules: extra"),
        (
            lambda g: tensors(g, lambda t: t["3.lr_model.weight"].fill_(float("nan"))),
            "3.lr_model.weight in .* holds NaN or infinite values",
        ),
    ],
)
def test_bad_input_of_hpr(tmp_path, four, guidance, spoil, message):
    spoil(guidance)
    with pytest.raises(ValueError, match=message):
        convert_hpr(guidance, tmp_path / "out", base_model=four)
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_left_alone(tmp_path, three, four, source, guidance):
    for folder in (source, guidance):
        before = sorted(folder.iterdir())
        with pytest.raises(ValueError, match="holds something else than an adapter"):
            convert_sea(source, folder, base_model=three)
        with pytest.raises(ValueError, match="holds something else than an adapter"):
            convert_hpr(guidance, folder, base_model=four)
        assert sorted(folder.iterdir()) == before
