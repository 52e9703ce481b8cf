import json

import pytest
from cases import FORMATS

from qkernels.quant import E2M1, IQ4_NL, QuantSpec, scheme_act


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"bits": 7}, "bits"),
        ({"bits": True}, "bits"),
        ({"bits": 4.0}, "bits"),
        ({"bits": 4, "group_size": 0}, "group_size"),
        ({"bits": 4, "group_size": 24}, "group_size"),
        ({"bits": 4, "group_size": -2}, "group_size"),
        ({"bits": 4, "scale": "float64"}, "scale"),
        ({"bits": 4, "zero": "asymmetric"}, "zero"),
        ({"bits": 4, "scale": "int8", "group_size": 48}, "divides 256"),
        ({"bits": 4, "scale": "int8", "group_size": -1}, "divides 256"),
        ({"bits": 4, "scale": "int8", "zero": "integer"}, "integer"),
        ({"bits": 2, "scale": "uint4", "group_size": 16}, "minimum"),
        ({"bits": 4, "scale": "e8m0", "zero": "minimum"}, "e8m0"),
        ({"bits": 8, "table": E2M1}, "bits=4"),
        ({"bits": 4, "table": E2M1, "zero": "integer"}, "symmetric"),
        ({"bits": 4, "table": E2M1[:15]}, "16 integers"),
        ({"bits": 4, "table": (*E2M1[:15], 200)}, "16 integers"),
        ({"bits": 4, "table": (0,) * 16}, "zeros"),
        ({"bits": 4, "group_size": -1, "act_order": True}, "act_order"),
    ],
)
def test_what_does_not_exist_is_refused(fields: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        QuantSpec(**fields)


@pytest.mark.parametrize("name", FORMATS)
def test_json_round_trip(name: str) -> None:
    spec = FORMATS[name].spec
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert hash(spec) == hash(QuantSpec.from_dict(spec.to_dict()))


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="rotation"):
        QuantSpec.from_dict({"bits": 4, "rotation": "hadamard"})
    with pytest.raises(ValueError, match="bits"):
        QuantSpec.from_dict({"group_size": 32})


def test_schemes() -> None:
    assert QuantSpec.from_scheme("W4A16", group_size=64) == QuantSpec(4, 64)
    assert QuantSpec.from_scheme("w4a8") == QuantSpec(4, 32)
    assert QuantSpec.from_scheme("W8A8") == QuantSpec(8, 32)
    assert QuantSpec.from_scheme("W8A16", group_size=128, zero="integer") == QuantSpec(
        8, 128, zero="integer"
    )
    assert QuantSpec.from_scheme("MXFP4") == QuantSpec(4, 32, "e8m0", table=E2M1)
    assert QuantSpec.from_scheme("nvfp4").group_size == 16
    assert [scheme_act(s) for s in ("W4A16", "W4A8", "W8A8", "MXFP4")] == [
        "float",
        "int8",
        "int8",
        "float",
    ]
    for unknown in ("W4", "W7A16", "W4A4", "int4", ""):
        with pytest.raises(ValueError, match="known are W2A16"):
            QuantSpec.from_scheme(unknown)
    with pytest.raises(TypeError, match="a text like 'W4A16', got 4"):
        QuantSpec.from_scheme(4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec, text",
    [
        (QuantSpec(4, 32, zero="minimum"), "W4 g32 float16 min"),
        (QuantSpec(8, -1, "float32"), "W8 row float32"),
        (QuantSpec(4, 128, zero="integer", act_order=True), "W4 g128 float16 zero act-order"),
        (QuantSpec(4, 32, "int8", table=IQ4_NL), "W4 g32 int8 iq4nl"),
        (QuantSpec(4, 32, "e8m0", table=E2M1), "W4 g32 e8m0 e2m1"),
    ],
)
def test_text(spec: QuantSpec, text: str) -> None:
    assert str(spec) == text


@pytest.mark.parametrize("name", FORMATS)
def test_bits_per_weight_are_those_of_the_disk(name: str) -> None:
    """Within 3% of what the format takes on disk, 10% for 2 and 3 bits."""
    spec, disk = FORMATS[name].spec, FORMATS[name].disk_bits
    assert spec.bits_per_weight <= disk * (1.10 if spec.bits < 4 else 1.03)
    assert spec.bits_per_weight >= spec.bits


def test_numbers_of_a_row() -> None:
    row = QuantSpec(8, -1)
    assert (row.group(100), row.groups(100), row.padded_k(100)) == (112, 1, 112)
    flat = QuantSpec(4, 32)
    assert (flat.group(100), flat.groups(100), flat.padded_k(100)) == (32, 4, 128)
    two_level = QuantSpec(4, 32, "int8")
    assert (two_level.groups(100), two_level.padded_k(100)) == (4, 256)
    assert (
        QuantSpec(4).zero_point,
        QuantSpec(8).zero_point,
        QuantSpec(4, table=E2M1).zero_point,
    ) == (8, 128, 0)
