"""safetensors files against the safetensors library, damaged files, disks that are full."""

import json
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from steep.engine.safetensors_io import DTYPES, INDEX_FILE, SINGLE_FILE, SafetensorsFolder, SafetensorsWriter


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bytes, so that NaN payloads and other unusual patterns are in it too."""
    count = torch.Size(shape).numel() * dtype.itemsize
    values = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return values.view(dtype).reshape(shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """Two shards in folder, written by the library; returns the tensors."""
    tensors = {name: torch.randn(4, 3) for name in ("a", "b", "c")}
    folder.mkdir(exist_ok=True)
    save_file({"a": tensors["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in "bc"}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors"} | dict.fromkeys("bc", "model-00002-of-00002.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 144}, "weight_map": weight_map}))
    return tensors


def test_reads_what_the_library_wrote_in_every_dtype(tmp_path: Path) -> None:
    tensors = {f"t.{name}": random_tensor(dtype, (5, 7)) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "ä b": torch.arange(6).reshape(1, 2, 3)}
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt", "note": "x"})
    folder = SafetensorsFolder(tmp_path)
    assert folder.metadata == {"format": "pt", "note": "x"}
    assert set(folder.names) == set(tensors)
    assert folder.total_bytes == sum(t.nbytes for t in tensors.values())
    for name, tensor in tensors.items():
        assert folder.shape(name) == tuple(tensor.shape)
        assert folder.dtype(name) == tensor.dtype
        assert same_bytes(folder.get(name), tensor)
        flat = torch.empty(min(3, tensor.numel()), dtype=tensor.dtype)
        lo = tensor.numel() - flat.numel()
        assert same_bytes(folder.read_into(name, lo, flat), tensor.reshape(-1)[lo:])
    assert torch.equal(folder.get_slice("t.I32", 2, 4), tensors["t.I32"][2:4])
    assert folder.get_slice("t.I32", 5, 5).shape == (0, 7)


def test_wrong_ranges_and_buffers_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, 3)}, tmp_path / SINGLE_FILE)
    folder = SafetensorsFolder(tmp_path)
    with pytest.raises(ValueError, match=r"a: rows \[2, 5\) of a tensor of shape \[4, 3\]"):
        folder.get_slice("a", 2, 5)
    with pytest.raises(ValueError, match=r"a: elements \[10, 14\) of 12"):
        folder.read_into("a", 10, torch.empty(4))
    with pytest.raises(ValueError, match=r"a: the buffer must be .* torch.float32"):
        folder.read_into("a", 0, torch.empty(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="no tensor b"):
        folder.get("b")


def test_names_are_in_file_order(tmp_path: Path) -> None:
    sharded(tmp_path)
    folder = SafetensorsFolder(tmp_path)
    assert folder.names == ["a", "b", "c"]
    assert [folder.file_of(name).name[:11] for name in folder.names] == ["model-00001", "model-00002", "model-00002"]


def test_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors: not found, but .* names it"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_shard(tmp_path: Path, keep: int) -> None:
    sharded(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors: (truncated|not a safetensors file)"):
        SafetensorsFolder(tmp_path)


def test_index_and_shards_that_disagree(tmp_path: Path) -> None:
    sharded(tmp_path)
    index = json.loads((tmp_path / INDEX_FILE).read_text())

    def write_index(weight_map: object) -> None:
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))

    first, second = index["weight_map"]["a"], index["weight_map"]["b"]
    write_index(index["weight_map"] | {"d": second})
    with pytest.raises(ValueError, match=f"tensor d should be in {second}, but no shard holds it"):
        SafetensorsFolder(tmp_path)
    write_index(index["weight_map"] | {"a": second, "c": first})
    with pytest.raises(ValueError, match=f"tensor a should be in {second}, but {first} holds it"):
        SafetensorsFolder(tmp_path)
    write_index({"a": first, "b": second})
    with pytest.raises(ValueError, match=f"{second}: holds tensor c, which .* does not name"):
        SafetensorsFolder(tmp_path)
    write_index({"a": "../other.safetensors"})
    with pytest.raises(ValueError, match=r"weight_map\['a'\] is '../other.safetensors'"):
        SafetensorsFolder(tmp_path)
    write_index(None)
    with pytest.raises(ValueError, match="weight_map must be"):
        SafetensorsFolder(tmp_path)
    (tmp_path / INDEX_FILE).write_text("{")
    with pytest.raises(ValueError, match="index.json: not a JSON object"):
        SafetensorsFolder(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="tensor b is also in model-00001-of-00002.safetensors"):
        SafetensorsFolder(tmp_path)


def test_folders_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: not found"):
        SafetensorsFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle, and only safetensors are read"):
        SafetensorsFolder(tmp_path)


def write_raw(file: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, 1, "a has dtype F4; supported: F64"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}}, 7, "torch.float32 .*, but has 7 bytes"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12, "a begins at byte 4 of the data"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 8, "damaged header entry of a"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "damaged header entry of a"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 9, "has bytes that belong to no tensor"),
    ],
)
def test_damaged_headers(tmp_path: Path, entries: dict, data: int, message: str) -> None:
    write_raw(tmp_path / SINGLE_FILE, entries, bytes(data))
    with pytest.raises(ValueError, match=message):
        SafetensorsFolder(tmp_path)


def test_not_safetensors_at_all(tmp_path: Path) -> None:
    for content in (b"{}" * 40, struct.pack("<Q", 4) + b"[12]" + bytes(9), struct.pack("<Q", 4) + b"\xff{}}"):
        (tmp_path / SINGLE_FILE).write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors: not a safetensors file"):
            SafetensorsFolder(tmp_path)


def test_writes_the_bytes_the_library_writes(tmp_path: Path) -> None:
    """In the library's own order of tensors the files are equal to the byte."""
    tensors = {name: random_tensor(DTYPES[dtype], shape) for name, dtype, shape in
               [("a.w", "F32", (3, 5)), ("b", "F32", (1,)), ("c", "BF16", (2, 2, 3)), ("d", "U8", (7,))]}  # fmt: skip
    save_file(tensors, tmp_path / "library.safetensors", metadata={"format": "pt"})
    with SafetensorsWriter(tmp_path, [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    assert (tmp_path / SINGLE_FILE).read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    assert not (tmp_path / INDEX_FILE).exists()


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(10, 10) for i in range(5)} | {"large": torch.randn(40, 40), "none": torch.empty(0)}
    specs = [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with SafetensorsWriter(tmp_path, specs, max_shard_bytes=900) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    files = sorted(entry.name for entry in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    for file in files:  # the library accepts each, and the index is right
        for name, tensor in load_file(tmp_path / file).items():
            assert index["weight_map"][name] == file
            assert torch.equal(tensor, tensors[name])
        with safe_open(tmp_path / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert SafetensorsFolder(tmp_path).names == list(tensors)


def test_mixed_dtypes_are_aligned(tmp_path: Path) -> None:
    """A library that maps the file needs every tensor at a multiple of its element size."""
    specs = [("byte", torch.uint8, (3,)), ("half", torch.bfloat16, (3,)), ("wide", torch.float64, (1,))]
    with SafetensorsWriter(tmp_path, specs) as writer:
        for name, dtype, shape in specs:
            writer.write(name, torch.ones(shape, dtype=dtype))
    header_bytes = struct.unpack("<Q", (tmp_path / SINGLE_FILE).read_bytes()[:8])[0]
    header = json.loads((tmp_path / SINGLE_FILE).read_bytes()[8 : 8 + header_bytes])
    for name, dtype, _ in specs:
        assert (8 + header_bytes + header[name]["data_offsets"][0]) % dtype.itemsize == 0
    assert set(load_file(tmp_path / SINGLE_FILE)) == {"byte", "half", "wide"}


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_ranges_in_any_order_and_from_threads(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("ranges")
    tensors = {name: torch.arange(i, i + 50, dtype=torch.float32) for i, name in enumerate("abc")}
    jobs = []
    for name in tensors:
        cuts = sorted({0, 50, *data.draw(st.lists(st.integers(0, 50), max_size=6))})
        jobs += [(name, lo, hi) for lo, hi in zip(cuts, cuts[1:])]
    jobs = data.draw(st.permutations(jobs))
    specs = [(name, torch.float32, (5, 10)) for name in tensors]
    with SafetensorsWriter(folder, specs, max_shard_bytes=400) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: writer.write_range(job[0], job[1], tensors[job[0]][job[1] : job[2]]), jobs))
    written = SafetensorsFolder(folder)
    assert all(torch.equal(written.get(name).reshape(-1), tensor) for name, tensor in tensors.items())


def test_every_element_exactly_once(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path, [("a", torch.float32, (4, 3)), ("b", torch.float32, (2,))])
    writer.write_range("a", 0, torch.zeros(5))
    writer.write_range("a", 8, torch.zeros(4))
    with pytest.raises(ValueError, match=r"a: elements \[4, 5\) are written twice"):
        writer.write_range("a", 4, torch.zeros(2))
    with pytest.raises(ValueError, match=r"a: elements \[8, 12\) are written twice"):
        writer.write_range("a", 6, torch.zeros(6))
    with pytest.raises(ValueError, match=r"a: elements \[9, 10\) are written twice"):
        writer.write_range("a", 9, torch.zeros(1))
    with pytest.raises(ValueError, match=r"a: elements \[8, 14\) of 12"):
        writer.write_range("a", 8, torch.zeros(6))
    with pytest.raises(ValueError, match="a has 9 of 12 elements written"):
        writer.close()


def test_writer_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensor name a is given twice"):
        SafetensorsWriter(tmp_path, [("a", torch.float32, (1,)), ("a", torch.float32, (1,))])
    with pytest.raises(ValueError, match="a has torch.complex128, which safetensors cannot hold"):
        SafetensorsWriter(tmp_path, [("a", torch.complex128, (1,))])
    with pytest.raises(ValueError, match="no tensors"):
        SafetensorsWriter(tmp_path, [])
    assert list(tmp_path.iterdir()) == []
    writer = SafetensorsWriter(tmp_path, [("a", torch.float32, (4, 3))])
    with pytest.raises(ValueError, match=r"a: given shape \[3, 4\], declared \[4, 3\]"):
        writer.write("a", torch.zeros(3, 4))
    with pytest.raises(ValueError, match="a: given torch.bfloat16 of 1 dimensions, declared torch.float32"):
        writer.write("a", torch.zeros(4, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="tensor b was not declared"):
        writer.write("b", torch.zeros(1))


def test_a_disk_too_small_is_found_before_any_work(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the disk: the error comes from the constructor, and nothing is published."""
    code = f"""
import resource, torch
from steep.data.files import atomic_folder
from steep.engine.safetensors_io import SafetensorsWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
with atomic_folder({str(tmp_path / "out")!r}) as folder:
    (folder / "config.json").write_text("{{}}")
    writer = SafetensorsWriter(folder, [("a", torch.float32, (1000,)), ("b", torch.float32, (5000,))], 5000)
    print("constructed")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "constructed" not in result.stdout
    assert "OSError" in result.stderr
    assert "model-00002-of-00002.safetensors" in result.stderr
    assert list(tmp_path.iterdir()) == []
