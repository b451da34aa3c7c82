"""From a model folder and task files to one published result; accuracies against the harness' whole pipeline."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from steep.eval import evaluate, load_model, load_tasks

HEADER = "question,choice0,choice1,choice2,choice3,answer\n"


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    for split, n in (("dev", 5), ("test", 12)):
        (tmp_path / split).mkdir()
        for subject in ("anatomy", "virology"):
            rows = "".join(f"Organ {i}?,a{i},b,c{i},d,{(i * 7 + len(subject)) % 4}\n" for i in range(n))
            (tmp_path / split / f"{subject}_{split}.csv").write_text(HEADER + rows)
    return tmp_path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = ["Der Patient hat Fieber.", "Die Leber ist ein Organ. " * 9]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_published_result(tiny: Path, mmlu: Path, corpus: Path, tmp_path: Path) -> None:
    seen: set[str] = set()
    out = tmp_path / "results" / "eval.json"
    result = evaluate(
        tiny,
        [f"mmlu:{mmlu}", f"perplexity:{corpus}"],
        limit=10,
        out=out,
        num_fewshot=0,
        progress=lambda task, done, total: seen.add(task),
    )
    published = json.loads(out.read_text())
    assert published["kind"] == "eval"
    assert published["figures"].keys() == {"mmlu", "mmlu_anatomy", "mmlu_virology", "perplexity"}
    assert seen == {"mmlu_anatomy", "mmlu_virology", "perplexity"}
    assert len(published["inputs"]) == 3
    for name in ("anatomy", "virology"):
        task = published["tasks"][f"mmlu_{name}"]
        assert task["n"] == len(task["items"]) == 10
        assert task["metrics"]["acc"]["value"] == pytest.approx(
            np.mean([row["pred"] == row["gold"] for row in task["items"]])
        )
    group = published["groups"]["mmlu"]
    assert group["n"] == 20
    assert group["metrics"]["acc"]["value"] == pytest.approx(
        np.mean([published["figures"][f"mmlu_{name}"]["acc"] for name in ("anatomy", "virology")])
    )
    assert published["model"]["parameters"] == result["model"]["parameters"]
    assert published["config"]["add_bos"] is True


def test_identity_follows_the_weights(tiny: Path, corpus: Path) -> None:
    tasks = [f"perplexity:{corpus}"]
    from_folder = evaluate(tiny, tasks)
    decoder, tokenizer, _ = load_model(tiny)
    in_memory = evaluate((decoder, tokenizer), tasks)
    assert in_memory["figures"] == from_folder["figures"]
    assert in_memory["tasks"] == from_folder["tasks"]
    with torch.no_grad():
        decoder.layers[1].down.weight[3, 4] += 1e-3
    changed = evaluate((decoder, tokenizer), tasks)
    assert changed["model"]["weights"] != in_memory["model"]["weights"]
    assert changed["figures"] != in_memory["figures"]


def test_generation_task(tiny: Path, tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(3)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        """
        task: mine
        output_type: generate_until
        data_files: {test: test.jsonl}
        doc_to_text: "{{question}}"
        doc_to_target: "{{answer}}"
        generation_kwargs: {until: ["x"], max_gen_toks: 6}
        filter_list:
          - {name: last, filter: [{function: regex, regex_pattern: "[0-9]", group_select: -1}, {function: take_first}]}
        metric_list: [{metric: exact_match, regexes_to_ignore: ["#### "]}]
        """
    )
    result = evaluate(tiny, [str(tmp_path / "mine.yaml")], out=tmp_path / "out.json")["tasks"]["mine"]
    assert result["metrics"].keys() == {"exact_match,last"}
    assert sum(count for name, count in result["counts"].items() if name.startswith("stop_")) == 3
    for row in result["items"]:
        reading = row["exact_match,last"]
        assert reading["correct"] == (reading["extracted"] == row["target"].removeprefix("#### "))


@pytest.mark.parametrize("shots", [0, 3])
def test_accuracies_are_the_harness_own(tiny: Path, mmlu: Path, shots: int) -> None:
    """The whole pipeline: their task, prompts, encoding, scoring and metrics over the same csv file."""
    lm_eval = pytest.importorskip("lm_eval")
    task = load_tasks([f"mmlu_anatomy:{mmlu}"], shots)[0]
    files = {"test": mmlu / "test" / "anatomy_test.csv", "dev": mmlu / "dev" / "anatomy_dev.csv"}
    config = {
        "task": "theirs",
        "dataset_path": "csv",
        "dataset_kwargs": {
            "data_files": {split: str(path) for split, path in files.items()},
            "cache_dir": str(mmlu / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": shots,
        "description": "The following are multiple choice questions (with answers) about anatomy.\n\n",
        "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        **{key: getattr(task.task, key) for key in ("doc_to_text", "doc_to_choice", "doc_to_target")},
    }
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tiny), "dtype": "float32"},
        tasks=[config],
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
    )
    ours = evaluate(tiny, [task], mode="lmeval")["tasks"]["mmlu_anatomy"]
    for metric in ("acc", "acc_norm"):
        assert ours["metrics"][metric]["value"] == pytest.approx(theirs["results"]["theirs"][f"{metric},none"])
    for row, sample in zip(ours["items"], theirs["samples"]["theirs"]):
        assert row["logprobs"] == pytest.approx([response[0][0] for response in sample["resps"]], abs=1e-4)


def test_nothing_is_written_for_bad_input(tiny: Path, mmlu: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with pytest.raises(ValueError, match="unknown"):
        evaluate(tiny, ["nope:x"], out=out)
    with pytest.raises(ValueError, match="limit: 0"):
        evaluate(tiny, [f"mmlu:{mmlu}"], limit=0, out=out)
    with pytest.raises(FileNotFoundError):
        evaluate(tmp_path / "no model", [f"mmlu:{mmlu}"], out=out)
    assert not out.exists()
