"""Task files: the prompts they make, against lm-evaluation-harness' own, and what they refuse."""

import json
import random
from pathlib import Path

import pytest
import yaml

from steep.eval import load_tasks
from steep.eval.task import Task, read_documents

HEADER = "question,choice0,choice1,choice2,choice3,answer\n"


def rows(name: str, n: int) -> str:
    return HEADER + "".join(f'" What is {name} {i}, or\nwhat? ",a{i},b{i},c{i},"d, {i}",{i % 4}\n' for i in range(n))


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    for split, n in (("dev", 5), ("test", 7)):
        (tmp_path / split).mkdir()
        for subject in ("clinical_knowledge", "virology"):
            (tmp_path / split / f"{subject}_{split}.csv").write_text(rows(f"{subject} {split}", n))
    return tmp_path


def harness_prompts(
    tmp_path: Path, config: dict, files: dict[str, Path], count: int
) -> tuple[list[str], list[list[str]]]:
    """Contexts and continuations that lm_eval builds from the same files."""
    api = pytest.importorskip("lm_eval.api.task")
    kind = {".csv": "csv", ".jsonl": "json"}[next(iter(files.values())).suffix]
    task = api.ConfigurableTask(
        config={
            "task": "theirs",
            "dataset_path": kind,
            "dataset_kwargs": {
                "data_files": {split: str(path) for split, path in files.items()},
                "cache_dir": str(tmp_path / "cache"),
            },
            "test_split": "test",
            **config,
        }
    )
    task.set_fewshot_seed(1234)
    shots = config.get("num_fewshot", 0)
    contexts, continuations = [], []
    for doc in list(task.test_docs())[:count]:
        contexts.append(task.fewshot_context(doc, shots))
        requests = task.construct_requests(doc, contexts[-1])
        continuations.append([request.args[1] for request in requests] if isinstance(requests, list) else [])
    return contexts, continuations


def test_mmlu_prompts_are_the_harness_own(mmlu: Path) -> None:
    (task,) = load_tasks([f"mmlu_clinical_knowledge:{mmlu}"])
    config = {
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": 5,
        "output_type": "multiple_choice",
        "doc_to_text": "{{question.strip()}}\nA. {{choice0}}\nB. {{choice1}}\nC. {{choice2}}\nD. {{choice3}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
        "description": "The following are multiple choice questions (with answers) about clinical knowledge.\n\n",
    }
    contexts, continuations = harness_prompts(mmlu, config, task.files, 7)
    ours = task.examples()
    assert [example.context for example in ours] == contexts
    assert [list(example.item.continuations) for example in ours if example.item] == continuations
    assert [example.item.gold for example in ours if example.item] == [i % 4 for i in range(7)]


@pytest.mark.parametrize("same_split", [False, True])
def test_random_shots_in_the_lmeval_mode_are_the_harness_own(tmp_path: Path, same_split: bool) -> None:
    files = {}
    for split in ("test", "train"):
        files[split] = tmp_path / f"{split}.jsonl"
        files[split].write_text("".join(json.dumps({"q": f"{split} {i}", "a": f"is {i}"}) + "\n" for i in range(20)))
    files["train"].write_text(files["train"].read_text() * 2)  # every document twice
    shared = {
        "output_type": "generate_until",
        "num_fewshot": 3,
        "fewshot_split": "test" if same_split else "train",
        "doc_to_text": "Q: {{q}}\nA:",
        "doc_to_target": "a",
        "target_delimiter": " ... ",
        "fewshot_delimiter": "\n---\n",
    }
    contexts, _ = harness_prompts(tmp_path, shared, files, 20)
    task = Task(task="mine", data_files={split: str(path) for split, path in files.items()}, **shared)
    (bound,) = load_tasks([task])
    assert [example.context for example in bound.examples(mode="lmeval")] == contexts


def test_golden_draws() -> None:
    """Indices that lm_eval 0.4.13 drew for five documents, 3 of 20, seed 1234."""
    generator = random.Random(1234)
    drawn = [generator.sample(range(20), 3) for _ in range(5)]
    assert drawn == [[14, 3, 0], [2, 18, 1], [2, 3, 11], [7, 0, 18], [0, 11, 15]]


def test_clean_shots_depend_on_seed_and_document_alone(tmp_path: Path) -> None:
    documents = [{"id": f"d{i}", "q": f"question {i}", "a": "yes"} for i in range(12)]
    task = Task(
        task="mine",
        output_type="generate_until",
        data_files={"test": str(tmp_path / "test.jsonl")},
        fewshot_split="test",
        num_fewshot=4,
        doc_id="id",
        doc_to_text="q",
        doc_to_target="a",
    )

    def prompts(order: list[dict], seed: int = 1234, limit: int | None = None) -> dict[str, str]:
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in order))
        return {example.id: example.context for example in load_tasks([task])[0].examples(limit, seed=seed)}

    all_of_them = prompts(documents)
    assert prompts(documents, limit=5) == {f"d{i}": all_of_them[f"d{i}"] for i in range(5)}
    assert prompts(documents, seed=1) != all_of_them
    for i in range(12):
        shots, question = all_of_them[f"d{i}"].rsplit("\n\n", 1)
        assert question == f"question {i}"
        assert f"question {i} yes" not in shots.split("\n\n")  # never its own example
        assert len(set(shots.split("\n\n"))) == 4


def test_subjects(mmlu: Path) -> None:
    tasks = load_tasks([f"mmlu:{mmlu}"])
    assert [task.name for task in tasks] == ["mmlu_clinical_knowledge", "mmlu_virology"]
    assert [task.group for task in tasks] == ["mmlu", "mmlu"]
    (one,) = load_tasks([f"mmlu_virology:{mmlu}"], num_fewshot=0)
    assert one.group is None
    assert one.examples(limit=1)[0].context.startswith(
        "The following are multiple choice questions (with answers) about virology.\n\nWhat is virology test 0"
    )


def test_fingerprint_follows_the_prompts(mmlu: Path) -> None:
    def fingerprint(**settings: int) -> str:
        return load_tasks([f"mmlu_virology:{mmlu}"], **settings)[0].fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(num_fewshot=2) != first
    path = mmlu / "test" / "virology_test.csv"
    path.write_text(path.read_text().replace("virology test 3", "virology test three"))
    assert fingerprint() != first


def write_task(tmp_path: Path, documents: list[dict], **changes: object) -> str:
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in documents))
    content = {
        "task": "mine",
        "output_type": "multiple_choice",
        "data_files": {"test": "test.jsonl"},
        "doc_to_text": "{{question}}",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
    }
    content = {key: value for key, value in {**content, **changes}.items() if value is not None}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "mine.yaml")


GOOD = {"question": "q", "options": ["x", "y"], "answer": "y"}


@pytest.mark.parametrize(
    ("answer", "target", "options", "gold"),
    [
        ("y", "answer", ["x", "y"], 1),
        (1, "answer", ["x", "y"], 1),
        ("1", "answer", ["x", "y"], 1),  # from a csv file
        ("1", "answer", ["1", "2"], 0),  # the choice itself
        ("1", "{{answer}}", ["1", "2"], 1),  # a rendered number is a place, as in the harness
        ("y", "{{answer}}", ["x", "y"], 1),
    ],
)
def test_gold(tmp_path: Path, answer: object, target: str, options: list[str], gold: int) -> None:
    path = write_task(tmp_path, [{"question": "q", "options": options, "answer": answer}], doc_to_target=target)
    item = load_tasks([path])[0].examples()[0].item
    assert item is not None
    assert item.gold == gold


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "z"}, r"row 1: doc_to_target gives 'z'"),
        ({"answer": 2}, r"row 1: doc_to_target gives '2'"),
        ({"answer": None}, r"row 1: doc_to_target: the field 'answer' is empty"),
        ({"options": ["y"]}, r"row 1: doc_to_choice gives \['y'\]; allowed: two or more"),
        ({"options": ["y", ""]}, r"row 1: doc_to_choice"),
        ({"question": 3, "options": "y"}, r"row 1: doc_to_choice"),
    ],
)
def test_bad_documents_are_named(tmp_path: Path, change: dict, message: str) -> None:
    path = write_task(tmp_path, [GOOD, {**GOOD, **change}])
    with pytest.raises(ValueError, match=message):
        load_tasks([path])[0].examples()


def test_template_over_a_missing_field(tmp_path: Path) -> None:
    path = write_task(tmp_path, [GOOD], doc_to_text="{{stem}}")
    with pytest.raises(ValueError, match="row 0: doc_to_text: the template .* does not render: 'stem' is undefined"):
        load_tasks([path])[0].examples()


def test_repeated_document_id(tmp_path: Path) -> None:
    path = write_task(tmp_path, [GOOD, GOOD], doc_id="question")
    with pytest.raises(ValueError, match="row 1: document id 'q' occurs twice"):
        load_tasks([path])[0].examples()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doc_to_txt": "x"}, "mine.yaml: doc_to_txt: unknown key; allowed: task, output_type"),
        ({"num_fewshot": "many"}, "mine.yaml: num_fewshot"),
        ({"num_fewshot": 2}, "no entry for fewshot_split None"),
        ({"doc_to_choice": None}, "doc_to_choice belongs to multiple_choice"),
        ({"output_type": "loglikelihood"}, "output_type"),
        ({"generation_kwargs": {"do_sample": True}}, "generation_kwargs.do_sample"),
        ({"test_split": "dev"}, "no entry for test_split 'dev'"),
        ({"fewshot_config": {"sampler": "last_n"}}, "fewshot_config.sampler"),
    ],
)
def test_bad_task_files(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tasks([write_task(tmp_path, [GOOD], **change)])


def test_bad_names(tmp_path: Path, mmlu: Path) -> None:
    for name, message in (
        ("mmlu", "where is its data"),
        ("arc:x", "unknown; allowed: a YAML file, or gsm8k"),
        (f"mmlu_latin:{mmlu}", "named 'mmlu_latin'"),
        (f"mmlu_virology:{mmlu / 'test' / 'virology_test.csv'}", "5 shots need the folder"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tasks([name])
    with pytest.raises(ValueError, match="given twice"):
        load_tasks([f"mmlu:{mmlu}", f"mmlu_virology:{mmlu}"])
    with pytest.raises(ValueError, match="no tasks"):
        load_tasks([])
    with pytest.raises(FileNotFoundError, match="medmcqa needs"):
        load_tasks([f"medmcqa:{tmp_path}"])
    with pytest.raises(FileNotFoundError, match="no such task file"):
        load_tasks([str(tmp_path / "none.yaml")])


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    documents = [{"q": "Fièvre\u2028élevée,\n?", "a": "ja"}, {"q": "x", "a": "nein"}]
    lines = "\n".join(json.dumps(doc, ensure_ascii=False) for doc in documents)
    (tmp_path / "lines.jsonl").write_text(lines)
    (tmp_path / "lines.json").write_text(lines + "\n\n")
    (tmp_path / "list.json").write_text(json.dumps(documents))
    (tmp_path / "rows.csv").write_text('\ufeffq,a\n"Fièvre\u2028élevée,\n?",ja\nx,nein\n')
    (tmp_path / "bare.csv").write_text('"Fièvre\u2028élevée,\n?",ja\nx,nein\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(documents), tmp_path / "table.parquet")
    for name in ("lines.jsonl", "lines.json", "list.json", "rows.csv", "table.parquet"):
        assert read_documents(tmp_path / name) == documents
    assert read_documents(tmp_path / "bare.csv", ["q", "a"]) == documents


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"q": 1}\n{"q"\n', "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "row 0 is a list"),
        ("a.csv", "q,a\nx\n", "row 0 does not have the 2 columns"),
        ("a.csv", "q,a\nx,y,z\n", "row 0 does not have the 2 columns"),
        ("a.txt", "x", "kind '.txt'"),
    ],
)
def test_bad_data_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)
