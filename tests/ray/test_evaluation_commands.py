"""``raydiv separation`` and ``raydiv evaluate`` through Ray, on tiny models: what they print, write and refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers.models import make_classifier, make_model
from raydiv.cli import main
from raydiv.config.cluster import ClusterConfig
from raydiv.evaluation.separation.distances import bhattacharyya_distance
from raydiv.evaluation.separation.metrics import principal_plane
from raydiv.runtime.session import ray_session


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    with ray_session(ClusterConfig()):
        yield


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Thirty harmful and thirty harmless prompts, as text and together."""
    folder = tmp_path_factory.mktemp("prompts")
    texts = {
        "harmful": [f"Hurt someone in way {n}" for n in range(30)],
        "harmless": [f"Help anyone to find number {n}" for n in range(30)],
    }
    rows = [
        {"prompt": text, "harmful": label == "harmful", "category": f"c{n % 2}"}
        for label, own in texts.items()
        for n, text in enumerate(own)
    ]
    found = {"both": folder / "both.jsonl"} | {label: folder / f"{label}.txt" for label in texts}
    found["both"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    for label, own in texts.items():
        found[label].write_text("\n".join(own) + "\n")
    return found


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["models"]


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_separation_by_layer_with_a_sample_and_states_kept(
    prompts: dict[str, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "states"
    [found] = printed(
        capsys,
        *("separation", tiny_model, "--harmful", prompts["harmful"], "--harmless", prompts["harmless"]),
        *("--layers", "all", "--sample", "40", "--embeddings", kept, "--intervals", "all"),
    )
    assert (found["count"], found["sampled"], found["layer"]) == (60, 40, 2)
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2]
    assert all(layer["d_b_interval"] for layer in found["layers"])
    assert any("a sample of 40" in note for note in found["notes"])
    table = pq.read_table(kept / "model-0-prompts-0.parquet")
    assert table.column_names == ["id", "harmful", "kind", "category", "tokens", "layer_0", "layer_1", "layer_2"]
    assert table.num_rows == 60
    harmful = np.array(table["harmful"])
    for layer in found["layers"]:
        points = np.array(table[f"layer_{layer['layer']}"].to_pylist(), dtype=np.float64)
        plane = principal_plane(points)
        assert layer["streamed"]["harmful"] == 30
        expected = bhattacharyya_distance(plane[harmful], plane[~harmful])
        # in fp32 on disk, and read in other batches
        assert layer["streamed"]["d_b"] == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.long
@pytest.mark.usefixtures("_ray")
def test_several_models_and_prompt_sets_are_each_reported(
    prompts: dict[str, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other", hidden=64)
    assert main(["separation", str(tiny_model), str(other)]) == 2
    message = capsys.readouterr().err
    assert "hidden size 64" in message
    assert "--different-models" in message
    sets = ("--prompts", prompts["both"], "--harmful", prompts["harmful"], "--harmless", prompts["harmless"])
    found = printed(capsys, "separation", tiny_model, *sets, "--pooling", "mean")
    names = [str(prompts["both"]), f"{prompts['harmful']}, {prompts['harmless']}"]
    assert [(one["model"], one["prompts"]) for one in found] == [(str(tiny_model), name) for name in names]
    # the same prompts, however they are given
    assert found[0]["figures"] == pytest.approx(found[1]["figures"], rel=1e-4)
    assert found[0]["protocol"] == "other"


@pytest.mark.long
@pytest.mark.usefixtures("_ray")
def test_everything_that_can_be_evaluated(
    prompts: dict[str, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other", seed=3)
    classifier = make_classifier(tmp_path / "classifier", {0: "non-toxic", 1: "toxic"})
    (tmp_path / "t.txt").write_text("A: {prompt}\nB: {prompt}\n")
    first, second = printed(
        capsys,
        *("evaluate", tiny_model, other, "--prompts", prompts["both"], "--max-new-tokens", "6", "--kl-prompts", "8"),
        *("--judge", f"harmbench:{tiny_model}", "--judge", "string", "--toxicity", classifier),
        *("--judge", f"strongreject:{tiny_model}"),
        *("--pairwise-judge", tiny_model),
        *(
            "--attack",
            "prefill",
            "--attack",
            f"templates={tmp_path / 't.txt'}",
            "--output",
            tmp_path / "out",
            "--show-text",
        ),
    )
    for found in (first, second):
        rates = found["rates"]
        # a random model says neither yes nor no, and is called neither safe nor unsafe
        assert rates["evaluate/safety"]["count"] == rates.get("evaluate/asr", {"count": 0})["count"] == 0
        assert rates["evaluate/unparsable"]["count"] > 0
        # string rules call what is no refusal unsafe
        assert 0 <= rates["evaluate/asr_judge/string"]["count"] <= 30
        assert found["agreement"] == {}
        assert 0 < rates[f"evaluate/harm_score/strongreject:{tiny_model.name}"]["share"] < 1
        assert any("512" in note for note in found["notes"])
        assert rates["evaluate/safety/c0"]["of"] == 15
        assert rates["evaluate/degenerate/templates"]["of"] == 30
        # a random model's own answers may be blank, which is not toxic
        assert 0 <= rates["evaluate/toxicity/harmful"]["share"] < 1
        assert 0 < rates["evaluate/toxicity/prefill"]["share"] < 1
        assert rates["evaluate/toxicity/prefill"]["of"] == 30
    assert first["kl"] is None
    # an estimate, of two models that are both near chance
    assert second["kl"]["value"] != 0
    assert second["kl"]["answers"] == 8
    assert "win_rate" not in first
    assert second["win_rate"]["of"] == 30
    lines = [json.loads(line) for line in (tmp_path / "out" / "model-1.answers.jsonl").read_text().splitlines()]
    assert len(lines) == 60 + 30 + 60
    assert [line["answer"].startswith("Sure, here is") for line in lines[60:90]] == [True] * 30
    outputs = json.loads((tmp_path / "out" / "model-0.outputs.json").read_text())
    assert len(outputs) == 30
    # stored answers are a baseline like any other
    [again] = printed(
        capsys,
        *("evaluate", other, "--prompts", prompts["both"], "--max-new-tokens", "6", "--kl-prompts", "0"),
        *("--pairwise-judge", tiny_model, "--baseline", tmp_path / "out" / "model-0.outputs.json"),
    )
    assert again["win_rate"] == second["win_rate"]


@pytest.mark.long
@pytest.mark.usefixtures("_ray")
def test_suffixes_are_sought_by_a_pool_and_asked_with(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Hurt {n}", "harmful": n < 2} for n in range(4)]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("evaluate", tiny_model, "--prompts", path, "--max-new-tokens", "4", "--attack", "gcg=1")
    [found] = printed(capsys, *words, "--output", tmp_path / "out", "--show-text")
    assert found["rates"]["evaluate/degenerate/gcg"]["of"] == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "model-0.answers.jsonl").read_text().splitlines()]
    assert [line["attack"] for line in lines] == ["direct"] * 4 + ["gcg"] * 2
    assert all(line["asked"].startswith(f"{line['prompt']} ") for line in lines[4:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--judge", "gpt2"], "--judge: gpt2: unknown judge"),
        (["--attack", "templates"], "need a FILE"),
        (["--attack", "templates=gone.txt"], "gone.txt: no such file"),
        (["--attack", "dance"], "--attack: "),
        (["--baseline", "x.json"], "--baseline: does not apply without --pairwise-judge"),
        (["--pairwise-judge", "m"], "--pairwise-judge: name two models, or a --baseline"),
        (["--task-limit", "3"], "task_limit needs tasks"),
        (["--task", "no_such_task"], "unknown task 'no_such_task'"),
        (["--max-new-tokens", "0"], "--max-new-tokens: Input should be greater than 0"),
        (["--harmful", "gone.txt"], "gone.txt: no such file"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    words: list[str], message: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tiny_model), *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("raydiv: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "x"], "--layers: must be all, or numbers"),
        (["--layers", "7"], "layers: 7: the model has layers 0 to 2"),
        (["--sample", "5"], "--sample: Input should be greater than or equal to 20"),
    ],
)
def test_what_cannot_be_separated_is_one_line(
    words: list[str], message: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["separation", str(tiny_model), *words]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_states_are_not_written_over(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model-0-prompts-0.parquet").write_text("")
    assert main(["separation", str(tiny_model), "--embeddings", str(tmp_path)]) == 2
    assert "--embeddings: " in capsys.readouterr().err


def test_a_toxicity_model_that_is_none_is_refused(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tiny_model), "--toxicity", str(tiny_model)]) == 2
    assert "not a text-classification model" in capsys.readouterr().err
