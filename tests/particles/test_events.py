import pytest
from torch import nn

from tests.particles.networks import network, neurons
from torch_meanfield import subscribe, transport_


def test_motions_are_published_to_those_who_asked():
    net, other = network(), network()
    seen, of_other = [], []
    with subscribe(seen.append), subscribe(of_other.append, model=nn.Sequential(other)):
        transport_(neurons(net), [0, 1, 2, 3, 4])  # moves nothing
        transport_(neurons(net), [1, 0, 2, 3, 4], cause="test")
        transport_(neurons(other), [1, 0, 2, 3, 4])
    transport_(neurons(net), [1, 0, 2, 3, 4])  # after the handles are gone
    assert [(m.population.owner is net, m.index.tolist(), m.cause) for m in seen] == [
        (True, [1, 0, 2, 3, 4], "test"),
        (False, [1, 0, 2, 3, 4], "transport"),
    ]
    assert [m.population.owner for m in of_other] == [other]
    with pytest.raises(TypeError, match="callback must be callable"):
        subscribe(3)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        subscribe(print, model=3)
