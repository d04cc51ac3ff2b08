"""What an edit does to one text, against a plain loop over hooks, and how it is shown."""

import json
import math
import re
import unicodedata
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from edits import EDITS, METHOD_OF, at, edited_model, two_adapters
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_collect import TOKENIZER, text
from test_prompts import byte_tokenizer
from tiny import FAMILIES, tiny_model, vivid_model

from peft_edit import HPRConfig, edit_strength
from peft_edit.evaluation.side_effects import NotFiniteError
from peft_edit.explaining import Explanation, SiteExplanation, TokenChange, explain_edit
from peft_edit.explaining.showing import TOKEN_VIEW_CSS, changed_rows, site_rows, token_view, token_view_html
from peft_edit.explaining.tables import escaped, prints
from peft_edit.explaining.texts import token_texts
from peft_edit.models.sites import find_sites, takes_input, unwrap
from peft_edit.tuners.layer import edit_layers


IDS = [5, 6, 7, 8, 9, 10, 11, 12, 5]


def recorded(model, edit, ids):
    """Logits (s, V), and block to the activations (s, d) of an edit's site there after all hooks."""
    seen, handles = {}, []
    for index, name in find_sites(model, at(edit)).items():
        module = unwrap(model).get_submodule(name)

        def keep(module, *values, index=index):
            value = values[-1][0] if isinstance(values[-1], tuple) else values[-1]
            seen[index] = value.reshape(-1, value.shape[-1]).clone()

        takes = takes_input(at(edit))
        handles.append(module.register_forward_pre_hook(keep) if takes else module.register_forward_hook(keep))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    return logits, seen


def plain(model, edit, ids):
    """What an edit is given and gives, block by block: the blocks before it edited, itself and those after it not."""
    layers = {layer.layer: layer for layer in map(Indexed, edit_layers(model))}
    given = {}
    for index in sorted(layers):
        off = [layer.edit for number, layer in layers.items() if number >= index]
        for layer in off:
            layer.enable_adapters(False)
        given[index] = recorded(model, edit, ids)[1][index]
        for layer in off:
            layer.enable_adapters(True)
    return given, recorded(model, edit, ids)


class Indexed:
    """A layer and the block that it is in."""

    def __init__(self, edit):
        self.edit = edit
        self.layer = next(int(part) for part in edit.site.split(".") if part.isdecimal())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edit", EDITS)
def test_equals_a_plain_loop_over_hooks(edit, family):
    model = edited_model(edit, family)
    found = explain_edit(model, TOKENIZER, text(IDS), top=3)
    before, (q, after) = plain(model, edit, IDS)
    with model.disable_adapter():
        p = recorded(model, edit, IDS)[0]
    assert [site.layer for site in found.sites] == sorted(before)
    for site in found.sites:
        assert site.adapter == "default" and site.name == find_sites(model, at(edit))[site.layer]
        for i, (h, out) in enumerate(zip(before[site.layer].double(), after[site.layer].double(), strict=True)):
            assert site.touched[i] == bool((h != out).any())
            assert site.change[i] == pytest.approx(float((out - h).norm() / h.norm()), rel=1e-3, abs=1e-5)
            cosine = float(torch.dot(h, out) / h.norm() / out.norm())
            assert math.cos(site.angle_rad[i]) == pytest.approx(cosine, abs=1e-4)
            assert site.norm_ratio[i] == pytest.approx(float(out.norm() / h.norm()), rel=1e-4)
        change = (after[site.layer] - before[site.layer])[torch.tensor(site.touched)]
        if len(change):
            cosines = torch.cosine_similarity(change, change.mean(dim=0, keepdim=True))
            mine = torch.tensor(site.cosine_to_mean_change)[torch.tensor(site.touched)]
            torch.testing.assert_close(mine, cosines, rtol=1e-2, atol=1e-2)
    p, q = p.double().softmax(dim=-1), q.double().softmax(dim=-1)
    assert found.kl == pytest.approx((p * (p / q).log()).sum(dim=-1).tolist(), rel=1e-3, abs=1e-6)
    for i in range(len(IDS)):
        order = (q[i] - p[i]).argsort(descending=True)
        for changes, wanted in ((found.gained[i], order[:3]), (found.lost[i], order.flip(0)[:3])):
            assert [change.token for change in changes] == [TOKENIZER.decode([token]) for token in wanted]
            assert [change.base for change in changes] == pytest.approx(p[i, wanted].tolist(), abs=1e-5)
            assert [change.edited for change in changes] == pytest.approx(q[i, wanted].tolist(), abs=1e-5)
    assert not any(layer.observer for layer in edit_layers(model))


@pytest.mark.parametrize("edit", EDITS)
def test_the_gate_decides(edit):
    """Where a method has a gate, it is what its edit goes by."""
    found = explain_edit(edited_model(edit), TOKENIZER, IDS)
    for site in found.sites:
        if METHOD_OF[edit].config is HPRConfig:
            assert site.touched == [probability <= 0.6 for probability in site.gate]
        else:
            assert site.gate is None
    if METHOD_OF[edit].config is HPRConfig:
        assert {True, False} == {value for site in found.sites for value in site.touched}


@pytest.mark.parametrize("edit", EDITS)
def test_each_of_several_adapters_has_sites_of_its_own(edit):
    model = two_adapters(edit)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = explain_edit(model, TOKENIZER, IDS).sites
        assert {site.adapter for site in alone[name]} == {name}
    model.base_model.set_adapter(["default", "other"])
    both = explain_edit(model, TOKENIZER, IDS)
    assert [site.adapter for site in both.sites[:2]] == ["default", "other"]
    assert both.sites[0] == alone["default"][0]  # which nothing precedes
    assert len(both.sites) == len(alone["default"]) + len(alone["other"])


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(edit, dtype):
    found = explain_edit(edited_model(edit, dtype=dtype), TOKENIZER, IDS)
    wide = explain_edit(edited_model(edit, dtype=dtype).float(), TOKENIZER, IDS)
    assert found.sites[0].change == pytest.approx(wide.sites[0].change, rel=0.1, abs=0.02)
    assert sum(found.kl) == pytest.approx(sum(wide.kl), rel=0.3, abs=0.05)
    json.dumps(found.to_dict(), allow_nan=False)


def test_texts_and_token_ids_mean_the_same_whatever_side_a_tokenizer_pads_on():
    model = edited_model("HPR").train()
    found = explain_edit(model, TOKENIZER, text(IDS))
    assert model.training and found == explain_edit(model, TOKENIZER, IDS)
    left = TOKENIZER.__class__(tokenizer_object=TOKENIZER.backend_tokenizer, padding_side="left")
    assert found == explain_edit(model, left, text(IDS))
    assert found.text == "".join(found.tokens) == text(IDS) and len(found) == len(IDS)
    assert found.touched == [any(site.touched[i] for site in found.sites) for i in range(len(IDS))]
    assert found.change == [max(site.change[i] for site in found.sites) for i in range(len(IDS))]


def test_no_strength_no_change():
    model = edited_model("HPR")
    with edit_strength(model, 0):
        found = explain_edit(model, TOKENIZER, IDS)
    assert found.kl == [0] * len(IDS) and not any(found.touched) and not any(found.gained + found.lost)
    assert {ratio for site in found.sites for ratio in site.norm_ratio} == {1}


def test_a_part_has_the_values_of_its_tokens():
    found = explain_edit(edited_model("HPR"), TOKENIZER, IDS)
    part = found.since(4)
    assert isinstance(part, Explanation) and part.tokens == found.tokens[4:] and part.kl == found.kl[4:]
    assert part.sites[1].gate == found.sites[1].gate[4:] and part.sites[1].name == found.sites[1].name
    assert part.text == "".join(found.tokens[4:]) and part.gained == found.gained[4:]


def test_of_the_last_token_alone():
    found = explain_edit(edited_model("HPR", token_scope="last", gate=1.0), TOKENIZER, IDS)
    assert found.touched == [False] * (len(IDS) - 1) + [True] and found.kl[:-1] == [0] * (len(IDS) - 1)


@settings(max_examples=50)
@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_tokens_together_are_the_text(words):
    """Tokens of single bytes, several of which make one character."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(words)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)


def test_what_cannot_be_explained_is_refused():
    base, edited = tiny_model(), edited_model("HPR")
    lora = get_peft_model(vivid_model(), LoraConfig(target_modules=["down_proj"]))
    merged = edited_model("SEA at the MLP")
    merged.merge_adapter()
    cases = [
        (base, text(IDS), {}, "has no active adapter"),
        (lora, text(IDS), {}, r"active adapters \('default'\) none edits activations"),
        (merged, text(IDS), {}, "an adapter is merged"),
        (edited, "", {}, "text has no tokens: pass some words"),
        (edited, [5, 640], {}, "the text: the tokenizer gives the id 640"),
        (edited, text(IDS), {"top": 0}, "top must be an integer of at least 1, got 0"),
    ]
    for model, words, options, message in cases:
        with pytest.raises(ValueError, match=message):
            explain_edit(model, TOKENIZER, words, **options)
    with edited.disable_adapter(), pytest.raises(ValueError, match="has no active adapter"):
        explain_edit(edited, TOKENIZER, text(IDS))
    with torch.no_grad():
        edited.get_base_model().lm_head.weight[3] = float("nan")
    with pytest.raises(NotFiniteError, match="wider dtype"):
        explain_edit(edited, TOKENIZER, text(IDS))


def explanation(tokens, kl=None, change=None, touched=None):
    """One of a single site, made by hand."""
    change = change or [0.0] * len(tokens)
    touched = touched or [value > 0 for value in change]
    site = SiteExplanation(
        *("layers.3", 3, "default", touched, None, change),
        *([0.0] * len(tokens), [1.0] * len(tokens), [0.0] * len(tokens)),
    )
    gained = [[TokenChange("<b>", 0.1, 0.9)] for _ in tokens]
    return Explanation("".join(tokens), tokens, [site], kl or [0.0] * len(tokens), gained, [[] for _ in tokens])


def test_the_view_without_colour():
    shown = token_view(
        explanation(["The", " sky", " is", " bl", "ue"], [0, 0.05, 0.2, 0.5, 7], [0, 1e-9, 0.2, 0.5, 3]), color=False
    )
    assert shown.splitlines() == [
        "     The sky is blue",
        "edit     ... -- ==##",
        "KL       ... -- ==##",
        "",
        "edit, largest |out - in| / |in|: . any, - from 0.1, = from 0.3, # from 1",
        "KL, nats: . from 0.01, - from 0.1, = from 0.3, # from 1",
    ]


def test_the_view_with_colour_says_the_same_and_ends_every_colour():
    found = explanation(["a", " b", " c"], [0, 0.5, 0], [0, 0, 1])
    shown = token_view(found, color=True)
    assert shown.splitlines()[0] == "     a\x1b[38;5;16;48;5;208m b\x1b[0m\x1b[4m c\x1b[0m"
    assert re.sub(r"\x1b\[[\d;]*m", "", shown) == token_view(found, color=False)


def test_tokens_that_make_one_character_are_shown_as_one():
    shown = token_view(explanation(["", "é", " x"], [2, 0, 0], [0, 0.2, 0]), color=False)
    assert shown.splitlines()[:3] == ["     é x", "edit -", "KL   #"]


def columns(line):
    """Of a terminal."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(c) in "WF") for c in line
    )


def test_what_people_write_is_shown_and_what_steers_a_terminal_is_not():
    spaces, joined = (
        "o\u00f9\u00a0? 10\u202f% \u65e5\u3000\u672c",
        "\u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f467",
    )
    assert escaped(spaces) == spaces and escaped(joined) == joined
    assert escaped("\x1b[2J\u202e\x9b\u2028") == r"\x1b[2J\u202e\x9b\u2028"


@pytest.mark.parametrize("text", [[1.5], ["a"], [[1, 2]], None, 5, [-1]])
def test_ids_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match=r"^text (must be text or a list of token ids|has the token id -1)"):
        explain_edit(edited_model("SEA at the MLP"), TOKENIZER, text)


def test_text_that_is_no_unicode_is_refused():
    with pytest.raises(ValueError, match="the text has half of a surrogate pair"):
        explain_edit(edited_model("SEA at the MLP"), TOKENIZER, "a\udcff")


@settings(max_examples=40)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=20), st.integers(20, 90), st.booleans())
def test_lines_are_no_wider_than_the_terminal_and_nothing_controls_it(tokens, width, color):
    shown = token_view(explanation(tokens, [0.2] * len(tokens), [0.2] * len(tokens)), color=color, width=width)
    bare = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert all(columns(line) <= width for line in bare.splitlines())
    assert all(prints(c) for line in bare.split("\n") for c in line)
    words = "".join("".join(tokens).split(" "))
    lines = [line for line in bare.split("\n\n")[0].splitlines() if line.startswith("     ")]
    assert "".join("".join(lines).split(" ")) == "".join(
        c if prints(c) else c.encode("unicode_escape").decode() for c in words
    )


def test_tables_of_tokens_and_sites():
    found = explanation(["one", " two", " a\nlong token of many letters"], [0.1, 2.5, 0.3], [0, 0.5, 0.25])
    assert changed_rows(found, 2)[1] == [
        ["1", '" two"', "2.500", "0.500", '"<b>" 0.10>0.90', ""],
        ["2", '" a\\nlon.."', "0.300", "0.250", '"<b>" 0.10>0.90', ""],
    ]
    assert [row[0] for row in changed_rows(found)[1]] == ["0", "1", "2"]
    header, rows = site_rows(found)
    assert header == ["layer", "touched", "change", "angle", "norm"]
    assert rows == [["3", "2/3", "0.375", "0.0 deg", "+0.0 %"]]
    header, rows = site_rows(explain_edit(two_adapters("HPR"), TOKENIZER, IDS))
    assert header[-1] == "gate, least to most" and len(rows) == 3
    model = two_adapters("HPR")
    model.base_model.set_adapter(["default", "other"])
    header, rows = site_rows(explain_edit(model, TOKENIZER, IDS))
    assert header[:2] == ["layer", "adapter"] and [row[1] for row in rows[:2]] == ["default", "other"]


class Parsed(HTMLParser):
    """The text of a fragment in spans of tokens, and whether its elements are closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.spans, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag == "span":
            self.spans.append(dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "span" and "title" in self.spans[-1]:
            self.texts.append(data)


@settings(max_examples=40)
@given(st.lists(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc"])), min_size=1, max_size=5))
def test_the_page_has_all_the_text_and_runs_none_of_it(tokens):
    parsed = Parsed(token_view_html(explanation(tokens)))
    assert "".join(parsed.texts) == "".join(tokens)


def test_the_page_tells_levels_by_classes_of_the_stylesheet():
    html = token_view_html(explanation(["<script>", "\n"], [0.5, 0], [0.2, 0]))
    assert '<span class="tv-token tv-kl3 tv-edit2"' in html and "&lt;script&gt;</span>" in html
    used = {name for group in re.findall(r'class="([^"]*)"', html) for name in group.split()}
    assert all(name.startswith("tv-") for name in used)
    known = set(re.findall(r"\.(tv-[\w-]+)", TOKEN_VIEW_CSS))
    assert used - known <= {"tv-kl0", "tv-edit0"}
    assert "id=" not in html  # several stand on one page


def luminance(color):
    """Relative, as WCAG 2 has it, of #rrggbb."""
    parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_stylesheet_can_be_read_and_its_levels_told_apart_without_colour(scheme):
    light, dark = TOKEN_VIEW_CSS.split("@media (prefers-color-scheme: dark)")
    of_scheme = light if scheme == "light" else dark
    value = {name: luminance(color) for name, color in re.findall(r"--tv-(\w+): (#\w{6})", of_scheme)}

    def contrast(one, other):
        high, low = sorted((value[one], value[other]), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert contrast("ink", "paper") >= 7 and contrast("line", "paper") >= 3
    assert all(contrast(f"ink{i}", f"kl{i}") >= 4.5 for i in range(1, 5))
    steps = ["paper", "kl1", "kl2", "kl3", "kl4"]
    rising = [value[name] for name in steps] if scheme == "dark" else [-value[name] for name in steps]
    assert rising == sorted(rising)
    assert all(contrast(a, b) >= 1.1 for a, b in pairwise(steps))
