"""Threads for their stacks."""

import threading

import pytest

from meshnode.io.llama.stack import on_stack, thread_of

DEEP = 64 * 1024 * 1024


def test_work_is_done_on_another_thread_and_its_result_and_error_come_back():
    assert on_stack(DEEP, threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        on_stack(DEEP, lambda: 1 // 0)


def test_other_threads_keep_their_stack():
    before = threading.stack_size()
    on_stack(DEEP, lambda: None)
    assert threading.stack_size() == before
    with pytest.raises(ValueError, match="size not valid"):
        on_stack(1, lambda: None)
    assert threading.stack_size() == before


def test_one_thread_does_all_in_order():
    with thread_of(DEEP, "order") as pool:
        found = [pool.submit(threading.get_ident) for _ in range(5)]
        assert len({each.result() for each in found}) == 1
