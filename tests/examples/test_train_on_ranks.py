"""What four processes train together is what one process trains."""

from unittest import mock

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
pytest.importorskip("transformers")
from tests.parallel.worlds import in_processes  # noqa: E402

NORM = "transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm.forward"
PRELOAD = "maskflash.parallel", "torch.distributed.fsdp", "transformers.models.gemma3.modeling_gemma3"
SHAPE = 2, 2  # token ranks, batches


def exact_norm(norm, x):
    """Gemma's norm in the dtype of x; its own rounds to float32, so that sums in another order would show."""
    return norm._norm(x) * (1 + norm.weight)


def trains(rank, mistake):
    """Losses and gradients, in float64; with a mistake as of a user who leaves something out."""
    from torch.distributed.device_mesh import init_device_mesh

    from maskflash.examples import train_on_ranks as example

    if mistake == "labels are shifted in their shard":
        whole, example.shifted = example.shifted, lambda tokens: tokens
        entropy = example.cross_entropy
        example.cross_entropy = lambda logits, own, **how: entropy(logits, whole(own[None])[0], **how)
    mesh = init_device_mesh("cpu", SHAPE, mesh_dim_names=("tokens", "batches"))
    with mock.patch(NORM, exact_norm):
        losses, gradients = example.train(mesh, torch.float64)
    return losses, {name: x.numpy() for name, x in gradients.items()}


@pytest.mark.parametrize("mistake", [None, "labels are shifted in their shard"])
def test_ranks_train_what_one_process_trains(mistake):
    from maskflash.examples.train_on_ranks import train_alone

    found = in_processes(4, trains, mistake, preload=PRELOAD)
    with mock.patch(NORM, exact_norm):
        losses, gradients = train_alone(SHAPE[1], torch.float64)
    assert sorted(found) == list(range(4))
    far = []
    for ours, by_name in found.values():
        assert list(by_name) == list(gradients)
        far += [abs(a - b) for a, b in zip(ours, losses, strict=True)]
        far += [float((torch.from_numpy(by_name[n]) - x).abs().max() / x.abs().max()) for n, x in gradients.items()]
    assert max(far) < 1e-10 if mistake is None else max(far) > 1e-4, max(far)
