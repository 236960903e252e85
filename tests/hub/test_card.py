"""What others wrote is text in a card: one line, without markup, wherever the card puts it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from embedded import VIT, Pruned, copy_of, pruned
from huggingface_hub import ModelCard
from hypothesis import given, strategies as st

from snows_hf import load
from snows_hf.hub.card import licence_of, plain, write_card


HOSTILE = (
    "x`\n\n# Run this\r\n![i](http://evil.example/i.png) <script>a</script> | [b](www.evil.example)\n---\n"
    "```sh\nrm a@b.c\n```"
)
MARKUP = re.compile(r"[`<>\[\]|#*!\\\n]|://|\bwww\.|\w@\w")


def infected(value: Any) -> Any:
    """A report whose every text, but for keys, ends in markup."""
    if isinstance(value, dict):
        return {key: infected(item) for key, item in value.items()}
    if isinstance(value, list):
        return [infected(item) for item in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def structure(text: str) -> list[str]:
    """What a card is made of besides words: headings, fences, links, rows of tables, HTML."""
    return re.findall(r"^#+ |^```\w*|!?\[[^]]*\]\(|\]\(|</?\w+>|^\|(?=.*\|$)|^---$|https?://", text, re.MULTILINE)


def test_a_report_of_somebody_elses_stays_text(result: Pruned, tmp_path: Path) -> None:
    checkpoint = load(result.folder)
    report = json.loads((result.folder / "snows_config.json").read_text())
    retraining = {"epochs": 1, "images": 2, "data": report["calibration_data"], "eval_data": report["eval_data"],
                  "before": report["pruned"], "after": report["pruned"], "teacher": "t",
                  "settings": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}}  # fmt: skip
    report |= {"finetune": retraining, "left_out": ["LICENSE"], "allocation": {"patterns": {"a": "b"}, "budget": "c"}}
    report["pattern"] = "1:4"  # 2:4 has a section of its own, by its very name
    report["dense_layers"] = [{"name": "layer", "reason": "none"}]
    cards = []
    for made in (report, infected(report)):
        write_card(checkpoint, tmp_path, made)
        cards.append((tmp_path / "README.md").read_text())
    assert "Run this" in cards[1]
    assert structure(cards[1]) == structure(cards[0])
    assert yaml.safe_load(cards[1].split("---\n")[1])["library_name"] == checkpoint.library
    assert ModelCard.load(tmp_path / "README.md").data.to_dict().keys() >= {"model-index", "tags"}


def test_a_trained_networks_card_too(tmp_path: Path) -> None:
    checkpoint = load(VIT)
    report = {
        "name": "n", "source": "s", "pattern": "0.9", "sparsity": 0.9, "layers": [], "versions": {"snows-hf": "1"},
        "settings": {"mask": "snip", "warm_up_bn": 1, "epochs": 1, "lr": 0.1, "schedule": "step", "batch_size": 8},
        "collapse": {"layers": {"layer": "no weight is left"}, "connected": False}, "images": 3, "seed": 0,
        "data": {"name": "me/d", "split": "train", "revision": None}, "eval_data": None, "accuracy": None,
        "training_seconds": 1.0, "hardware": "a CPU",
    }  # fmt: skip
    cards = []
    for made in (report, infected(report) | {"collapse": {"layers": {HOSTILE: HOSTILE}, "connected": False}}):
        write_card(checkpoint, tmp_path, made)
        cards.append((tmp_path / "README.md").read_text())
    assert structure(cards[1]) == structure(cards[0])


@given(st.text() | st.text("`<>[]()|#*!\\\n\r\t/:@w. ab\u2028\u202e", max_size=40))
def test_any_text_becomes_plain(text: str) -> None:
    found = plain(text)
    assert not MARKUP.search(found) and found.isprintable() and len(found) <= 200
    assert plain(found) == found


@pytest.mark.parametrize("text", [
    "vit.layers.0.attention.o_proj", "google/vit-base-patch16-224", "1:4,2:4,dense", "2:4 does not fit its width",
    "Intel(R) Xeon(R) CPU @ 2.20GHz, 2 cores", "0.1.0", "résumé", "apache-2.0", "_private_", "refs/convert/parquet",
])  # fmt: skip
def test_what_names_look_like_is_kept(text: str) -> None:
    assert plain({"name": [text]}) == {"name": [text]}


def test_a_licence_of_somebody_elses(tmp_path: Path) -> None:
    folder = copy_of(VIT, tmp_path / "m")
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'license': 'other', 'license_name': HOSTILE})}---\n")
    card = (pruned(folder, tmp_path / "out").folder / "README.md").read_text()
    assert "Run this" in card
    assert "# Run this" not in card and "![i]" not in card and "<script>" not in card and "```sh" not in card
    assert card.count("\n---\n") == 1 and ModelCard.load(tmp_path / "out/README.md").data.license == "other"


@pytest.mark.parametrize("link, kept", [
    ("LICENSE", True), ("LICENSE.md", True), ("https://example.com/licence?v=1#a", True), ("http://example.com", True),
    ("javascript:alert(1)", False), ("../../etc/passwd", False), ("data:text/html,x", False), ("https://a b", False),
    ("https://a)![x](http://b", False), ("https://a\n# b", False), ("LICENSE/../x", False), ("https://<b>", False),
])  # fmt: skip
def test_links_to_licences(link: str, kept: bool, tmp_path: Path) -> None:
    said = {"license": "other", "license_name": "own", "license_link": link}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(said)}---\n")
    assert licence_of(tmp_path) == {"license": "other", "license_name": "own"} | (
        {"license_link": link} if kept else {}
    )
