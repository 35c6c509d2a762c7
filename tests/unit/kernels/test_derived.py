"""What is made from tensors is made once, and again as soon as one of them is another."""

import gc
import weakref

import pytest
import torch

from lorq.kernels.derived import Derived


@pytest.fixture
def sums():
    """What is made, and of which settings it was, in order."""
    made = []

    def make(tensors, *settings):
        made.append(settings)
        return sum(t.sum() for t in tensors if t is not None)

    return Derived(make, copies=True), made


def test_it_is_made_once_for_the_same_tensors_and_settings(sums):
    derived, made = sums
    a, b = torch.ones(3), torch.ones(2)
    assert derived.of([a, None, b], 1) == 5 and derived.of([a, None, b], 1) == 5 and made == [(1,)]
    assert derived.of([a, None, b], 2) == 5 and derived.of([b]) == 2 and derived.of([a, None, b], 2) == 5
    assert made == [(1,), (2,), ()]


def test_it_is_made_again_when_a_tensor_is_another_or_was_written_to(sums):
    derived, made = sums
    a, b = torch.ones(3), torch.ones(2)
    changes = {
        "written to": (lambda: b.add_(1), lambda: [a, b], 7),
        "other memory": (lambda: b.set_(torch.zeros(2)), lambda: [a, b], 3),
        "left away": (lambda: None, lambda: [a, None], 3),
        "another name for the same memory": (lambda: None, lambda: [a, b.data], 3),
    }
    derived.of([a, b])
    for name, (change, tensors, total) in changes.items():
        count = len(made)
        change()
        assert derived.of(tensors()) == total and len(made) == count + 1, name


def test_what_reads_the_tensors_where_they_lie_is_made_again_only_elsewhere():
    made = []
    derived = Derived(lambda tensors: made.append(tensors[0].data_ptr()), copies=False)
    a = torch.ones(3)
    derived.of([a]), derived.of([a.add_(1)]), derived.of([a])
    assert len(made) == 1
    a.data = torch.zeros(3)
    derived.of([a])
    assert made == [made[0], a.data_ptr()]


@pytest.mark.parametrize("which", [0, 1])
def test_it_goes_with_any_of_its_tensors(which):
    class Made:
        pass

    derived = Derived(lambda tensors: Made(), copies=False)
    tensors = [torch.ones(3), torch.ones(2)]
    made = weakref.ref(derived.of(tensors))
    gc.disable()
    try:
        assert made() is derived.of(tensors)
        # The memory of what is gone may be another's next, of another shape.
        tensors[which] = None
        assert made() is None
    finally:
        gc.enable()


def test_a_tensor_that_goes_does_not_take_what_was_made_later_under_its_id(sums):
    derived, made = sums
    a, b = torch.ones(3), torch.ones(2)
    derived.of([a, b])
    derived.of([a])
    del b
    assert derived.of([a]) == 3 and len(made) == 2


def test_making_may_move_the_tensors():
    made = []

    def move(tensors):
        made.append(len(tensors))
        whole = torch.cat(tensors)
        for tensor, part in zip(tensors, whole.split([len(t) for t in tensors]), strict=True):
            tensor.data = part
        return whole

    for copies in (False, True):
        derived, tensors = Derived(move, copies=copies), [torch.ones(3), torch.zeros(2)]
        assert derived.of(tensors) is derived.of(tensors) and tensors[1].data_ptr() == tensors[0].data_ptr() + 12
    assert made == [2, 2]


def test_tensors_that_count_no_changes_are_not_relied_upon(sums):
    derived, made = sums
    with torch.inference_mode():
        a = torch.ones(3)
        assert derived.of([a]) == 3 and derived.of([a.add_(1)]) == 6 and len(made) == 2


def test_two_tensors_of_one_entry_may_go_in_two_threads():
    class Raced(dict):
        """Whose entry another thread takes out right after it was looked at."""

        def get(self, key):
            found = super().get(key)
            self.pop(key, None)
            return found

    derived, x = Derived(lambda tensors: 2 * tensors[0], copies=True), torch.ones(1)
    derived.of([x])
    ((key, kept),) = derived._kept.items()
    derived._kept = Raced(derived._kept)
    derived._forgetter(key)(kept[3][0])
    assert not derived._kept
