#!/usr/bin/env python3
"""Compares SafetensorsFile with the Python package safetensors on generated files and the corpus.

    pip install safetensors==0.8.0 numpy
    python3 tests/fuzz/compare_readers.py [--files 2000] [--seed 1]

Each file is a sound one with up to three changes, of the header's text or of what it says. Both
readers must refuse it or read the same of it, except for the differences that SafetensorsFile
documents; any other is printed, and the exit status is 1.
"""

import argparse
import collections
import json
import pathlib
import random
import struct
import subprocess
import sys
import tempfile

import safetensors

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent

BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8, "BOOL": 8, "F6_E2M3": 6,
    "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


def sound_tensors(rng):
    """A list of [name, {dtype, shape, data_offsets}], and the bytes of all."""
    tensors, end = [], 0
    for i in range(rng.randrange(4)):
        dtype = rng.choice(list(BITS))
        shape = [rng.choice([0, 1, 2, 3, 4, 8]) for _ in range(rng.randrange(4))]
        bits = BITS[dtype]
        for size in shape:
            bits *= size
        if bits % 8:
            shape.append(8)
            bits *= 8
        tensors.append(
            [f"t{i}", {"dtype": dtype, "shape": shape, "data_offsets": [end, end + bits // 8]}]
        )
        end += bits // 8
    return tensors, end


ODD_VALUES = [
    "null", "true", "0", "-1", "1.0", "1e400", "18446744073709551616", '"x"', '"F32"', '"F31"',
    "[]", "{}", "[0]", "[0,0]", "[[0],0]", '{"a":"b"}', '{"F32":null}', "[0,4,4]", "NaN", "",
    "-0", "1e0", "01", '"\\u0046\\u0033\\u0032"', '"\\ud800"', '{"a":null}', '["F32",[1],[0,4]]',
]  # fmt: skip


def change_meaning(rng, tensors, extra):
    """One change of what the header says."""
    kind = rng.randrange(12)
    if kind == 0:
        extra.append(["__metadata__", rng.choice(ODD_VALUES)])
    elif kind == 1:
        extra.append(["__metadata__", json.dumps({rng.choice("ab"): rng.choice("xy")})])
    elif kind == 2:
        extra.append([rng.choice(["u", "t0", ""]), rng.choice(ODD_VALUES)])
    elif not tensors:
        return
    else:
        tensor = rng.choice(tensors)
        name, entry = tensor
        if isinstance(entry, Raw):
            return
        if kind == 3:
            entry[rng.choice(["dtype", "shape", "data_offsets", "strides"])] = Raw(
                rng.choice(ODD_VALUES)
            )
        elif kind == 4:
            entry.pop(rng.choice(["dtype", "shape", "data_offsets"]), None)
        elif kind == 5:
            entry["dtype"] = rng.choice(list(BITS) + ["F31", "", "f32", "F4_E2M1"])
        elif kind == 6 and isinstance(entry.get("data_offsets"), list):
            place = rng.randrange(2)
            entry["data_offsets"][place] += rng.choice([-4, -1, 1, 4, 2**63, 2**64])
        elif kind == 7 and isinstance(entry.get("shape"), list):
            entry["shape"].append(rng.choice([0, 1, 2, 2**32, 2**63]))
        elif kind == 8:
            entry["more"] = Raw(rng.choice(ODD_VALUES))
        elif kind == 9:
            extra.append([name, to_json(entry)])
        elif kind == 10 and isinstance(entry.get("dtype"), str):
            entry["dtype"] = Raw('{"' + entry["dtype"] + '":null}')
        elif kind == 11:
            tensor[1] = Raw(to_json(list(entry.values())))


class Raw(str):
    """A text that goes into the JSON as it is."""


def to_json(value):
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(json.dumps(k) + ":" + to_json(v) for k, v in value.items()) + "}"
    return json.dumps(value, separators=(",", ":"))


def change_text(rng, text):
    """One change of the header's bytes."""
    kind = rng.randrange(5)
    place = rng.randrange(len(text) + 1)
    if kind == 0:
        return text + rng.choice([b" ", b"\n\t\r ", b"\0", b" \0 ", b"}", b"x", b"{}", b"\xc2\xa0"])
    if kind == 1:
        return rng.choice([b" ", b"\n", b"\xef\xbb\xbf", b"\0"]) + text
    if kind == 2:
        return text[:place] + bytes([rng.randrange(256)]) + text[place:]
    if kind == 3:
        return text[:place] + text[place + 1 :]
    return text[:place] + rng.choice([b" ", b",", b"\0", b"\\", b'"']) + text[place:]


def generate(rng):
    tensors, data = sound_tensors(rng)
    extra = []
    for _ in range(rng.randrange(3)):
        change_meaning(rng, tensors, extra)
    items = [json.dumps(name) + ":" + to_json(entry) for name, entry in tensors]
    for name, value in extra:
        items.insert(rng.randrange(len(items) + 1), json.dumps(name) + ":" + value)
    text = ("{" + ",".join(items) + "}").encode()
    if rng.random() < 0.3:
        text = change_text(rng, text)
    length = len(text) + (rng.choice([-1, 1, 2**40, 10**8]) if rng.random() < 0.03 else 0)
    data += rng.choice([-1, 1, 4]) if rng.random() < 0.05 else 0
    return struct.pack("<Q", max(0, length)) + text + bytes(max(0, data))


def reference(path):
    """What the package makes of a file, in the shape of outcome.cpp's answers."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {}
            for name in file.keys():
                tensor = file.get_slice(name)
                tensors[name] = [tensor.get_dtype(), tensor.get_shape()]
            return {"metadata": file.metadata() or {}, "tensors": tensors}
    except Exception as error:  # the package has several kinds
        return {"refused": str(error)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/outcome"
        subprocess.run(
            ["c++", "-std=c++20", "-O1", "-I", ROOT / "include", "-isystem", "/usr/include/eigen3",
             HERE / "outcome.cpp", "-o", program], check=True)  # fmt: skip
        paths = sorted(str(path) for path in (HERE / "corpus").glob("*/*"))
        for i in range(arguments.files):
            paths.append(f"{folder}/{i}")
            pathlib.Path(paths[-1]).write_bytes(generate(rng))
        answers = subprocess.run(
            [program], input="\n".join(paths), capture_output=True, text=True, check=True
        ).stdout.splitlines()
        count = collections.Counter()
        for path, answer in zip(paths, answers, strict=True):
            ours, theirs = json.loads(answer), reference(path)
            for name, tensor in ours.get("tensors", {}).items():
                ours["tensors"][name] = tensor[:2]
            if "refused" in ours and "refused" in theirs:
                kind = "both refuse"
            elif ours == theirs:
                kind = "both read, and the same"
            elif why := documented(ours, theirs, pathlib.Path(path).read_bytes()):
                kind = "documented: " + why
            else:
                kind = "DIFFERENT"
                print(path, pathlib.Path(path).read_bytes()[:1000], "\n  ours:  ", ours,
                      "\n  theirs:", theirs)  # fmt: skip
            count[kind] += 1
        for kind, number in sorted(count.items()):
            print(f"{number:6} {kind}")
    return 1 if count["DIFFERENT"] else 0


def has_a_key_twice(file):
    twice = []

    def see(pairs):
        names = [name for name, _ in pairs]
        twice.append(len(names) != len(set(names)))

    length = struct.unpack("<Q", file[:8])[0]
    json.loads(file[8 : 8 + length], object_pairs_hook=see)
    return any(twice)


def documented(ours, theirs, file):
    """Which of the differences that SafetensorsFile documents this is."""
    refused = ours.get("refused", "")
    if refused and has_a_key_twice(file):
        return "a key that is there twice: refused here"
    for words, why in [
        ("does not begin with {", "white space before {"),
        ("is not an object", "a list for a tensor"),
        ("dtype is not a string", "an object for a dtype"),
        ("more than 64 numbers", "more than 64 dimensions"),
    ]:
        if words in refused:
            return why + ": refused here"
    if "refused" in theirs and not refused:
        if "unknown variant" in theirs["refused"]:
            return "a dtype that the package does not know: read here"
        if any(tensor[0] not in BITS for tensor in ours["tensors"].values()):
            return "a dtype that the package does not know: read here"
        if any(0 in tensor[1] for tensor in ours["tensors"].values()):
            return "sizes that overflow before a zero: read here"
    return None


if __name__ == "__main__":
    sys.exit(main())
