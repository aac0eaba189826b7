"""A captured table follows the call to its device, and its copy is new exactly when the table has been written to."""

import gc

import torch

from maskflash.ground import copies

META = torch.device("meta")


def test_a_table_is_copied_once_for_each_version():
    table = torch.arange(5)
    assert copies.on(table, table.device) is table
    copy = copies.on(table, META)
    assert (copy.device, copy.shape, copy.dtype) == (META, table.shape, table.dtype)
    assert copies.on(table, META) is copy
    table[0] = 7
    assert copies.on(table, META) is not copy


def test_an_equal_table_is_another():
    assert copies.on(torch.arange(5), META) is not copies.on(torch.arange(5), META)


def test_the_copy_of_a_table_that_is_gone_goes_when_the_next_is_made():
    table, other = torch.arange(5), torch.arange(6)
    copies.on(table, META)
    key = id(table), META
    assert key in copies._copies
    del table
    gc.collect()
    copies.on(other, META)
    assert key not in copies._copies
