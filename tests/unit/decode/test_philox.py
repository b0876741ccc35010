from __future__ import annotations

import numpy as np
import pytest
import torch

from services.decode.philox import philox4x32, uniforms, uniforms_at

CPU = torch.device("cpu")

# Known answers of the authors' Random123 library (kat_vectors, philox4x32, 10 rounds).
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_answers(counter, key, answer):
    words = philox4x32(torch.tensor([counter]), key[0] | key[1] << 32)

    assert tuple(words[0].tolist()) == answer


def test_uniforms_do_not_depend_on_how_many_are_asked_for():
    few = uniforms(5, seed=7, position=3, device=CPU)
    many = uniforms(49_152, seed=7, position=3, device=CPU)

    assert few.tolist() == many[:5].tolist()


def test_some_uniforms_are_those_of_all():
    indices = torch.tensor([0, 1, 2, 3, 4, 7, 40_001, 49_151, 5])

    some = uniforms_at(indices, seed=-7, position=3)

    assert some.tolist() == uniforms(49_152, seed=-7, position=3, device=CPU)[indices].tolist()


def test_uniforms_of_another_seed_or_position_are_others():
    numbers = uniforms(1000, seed=7, position=3, device=CPU)

    assert not (numbers == uniforms(1000, seed=8, position=3, device=CPU)).any()
    assert not (numbers == uniforms(1000, seed=7 + 2**40, position=3, device=CPU)).any()
    assert not (numbers == uniforms(1000, seed=7, position=4, device=CPU)).any()


def test_a_negative_seed_is_its_64_bits():
    assert torch.equal(
        uniforms(8, seed=-1, position=0, device=CPU),
        uniforms(8, seed=2**64 - 1, position=0, device=CPU),
    )


def test_uniforms_stay_inside_and_are_even():
    numbers = torch.cat([uniforms(4096, seed=1, position=p, device=CPU) for p in range(50)])

    assert 0 < numbers.min() < numbers.max() < 1
    counts, _ = np.histogram(numbers.numpy(), bins=64, range=(0, 1))
    chi_square = float(((counts - 3200) ** 2 / 3200).sum())
    assert chi_square < 116.1  # 63 degrees of freedom: passed once in 20,000 by honest numbers


def test_no_numbers_are_asked_for():
    assert uniforms(0, seed=1, position=1, device=CPU).shape == (0,)
