"""Faster fp32 products are used only where they are fp32, and leave the setting as it was."""

import pytest
import torch
from torch import nn

from keel.core import products
from keel.core.products import exact_here, fast_products, worth

SETTING = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def fresh():
    before = SETTING.fp32_precision
    exact_here.cache_clear()
    yield
    SETTING.fp32_precision = before
    exact_here.cache_clear()


@pytest.mark.parametrize("shape", [(3, 5, 7), (128, 300, 900), (1000, 64, 64)])
def test_products_keep_the_precision_of_fp32(shape):
    rows, inner, columns = shape
    draws = torch.Generator().manual_seed(1)
    a, b = torch.randn(rows, inner, generator=draws), torch.randn(inner, columns, generator=draws)
    wanted = a.double() @ b.double()
    with fast_products():
        found = a @ b
    assert float((found - wanted).abs().max()) < 5e-7 * inner**0.5 * float(wanted.abs().max())


def test_the_setting_is_restored_also_after_an_error():
    before = SETTING.fp32_precision
    with pytest.raises(KeyError), fast_products():
        raise KeyError
    assert SETTING.fp32_precision == before


def test_where_products_are_rounded_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(products, "_as_exact", lambda *shape: False)
    before = SETTING.fp32_precision
    with fast_products():
        assert SETTING.fp32_precision == before


def test_rounding_is_noticed(monkeypatch):
    product = torch.Tensor.__matmul__

    def rounded(a, b):
        if SETTING.fp32_precision == "bf16" and a.dtype == torch.float32:
            return product(a.bfloat16(), b.bfloat16()).float()
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not exact_here()


def test_a_users_own_choice_stands():
    SETTING.fp32_precision = "tf32"
    with fast_products():
        assert SETTING.fp32_precision == "tf32"


def test_it_can_be_left_off():
    before = SETTING.fp32_precision
    with fast_products(active=False):
        assert SETTING.fp32_precision == before


def test_what_is_worth_it():
    head = nn.Linear(128, 32768)
    assert worth(torch.zeros(16, 128), head) and not worth(torch.zeros(2, 128), head)
    assert not worth(torch.zeros(1, 128), nn.Linear(128, 1 << 20)), "one row is a product with a vector"
    assert not worth(torch.zeros(64, 128), None)
