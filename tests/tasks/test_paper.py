"""The paper's numbers, and that each reading of them names things that there are."""

import statistics

import pytest

from surgery import METHODS as EXPLAINERS
from surgery import RECIPES
from tasks.reproduce import PLANS
from tasks.reproduce.numbers import numbers
from tasks.reproduce.tables import ABLATIONS, METHODS


def values(**wanted: str) -> list[float]:
    return [
        number.value
        for number in numbers()
        if number.value is not None and all(getattr(number, k) == v for k, v in wanted.items())
    ]


def test_the_numbers_agree_with_each_other():
    """What the paper prints twice, and the means that it prints, are the same here."""
    for data in ("imagenet_s", "voc", "pascal_context", "coco"):
        for metric in ("mIoU", "mSC"):
            where = {"data": data, "metric": metric}
            ours, clip = (values(table="1", row=row, **where) for row in ("Ours", "CLIP"))
            assert len(ours) == len(clip) == 5
            (printed,) = values(table="1", row="Mean difference", **where)
            found = statistics.mean(a - b for a, b in zip(ours, clip, strict=True))
            assert found == pytest.approx(printed, abs=2e-4)
            for row in ("CLIP", "Ours"):
                for backbone in ("rn50", "vit_b16"):
                    one, two = (values(table=t, row=row, backbone=backbone, **where) for t in "12")
                    assert one == two
    (method,) = values(table="4", row="Multi + Dual + Attn")
    assert [method] == values(table="3", row="Architecture + feature surgery", metric="mSC")
    assert values(row="RCLIP", backbone="rn50", metric="mSC") == [
        -value for value in values(table="2", row="CLIP", backbone="rn50", metric="mSC")
    ]


def test_every_reading_is_a_config_with_its_options():
    from tasks._configs import all_names

    names = all_names()
    for plan in PLANS.values():
        for cell in plan.cells():
            if cell.reading is None:
                continue
            assert cell.reading.config in names, cell
            assert cell.reading.method in ("", *EXPLAINERS), cell
            for option in cell.reading.options:
                name, _, value = option.partition("=")
                if name == "--model.backbone.attention":
                    assert value in RECIPES


def test_what_is_not_ours_to_run_has_no_reading():
    tables = {name: plan.cells() for name, plan in PLANS.items() if name.startswith("table")}
    with_runs = {(name[-1], c.row) for name, found in tables.items() for c in found if c.reading}
    assert {row for table, row in with_runs if table == "2"} == set(METHODS)
    assert {row for table, row in with_runs if table == "4"} == {"CLIP", *ABLATIONS}
    assert {row for table, row in with_runs if table == "5"} == {"MaskCLIP", "Ours"}
    assert {row for table, row in with_runs if table == "6"} == {
        "CLIP",
        "Ours",
        "TaI-DPT",
        "TaI-DPT + Ours",
    }
    literal = [
        cell.reading
        for cell in tables["table1"]
        if cell.reading and "--model.backbone.blocks=from 7" in cell.reading.options
    ]
    assert len(literal) == 8
    assert all(reading.config.startswith("vit_l14_") for reading in literal)
