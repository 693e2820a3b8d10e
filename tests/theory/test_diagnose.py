"""diagnose: numbers against plain computations, one failing network for each finding, nothing disturbed, bad input."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from recipes.theory.deep import Teacher, deep_stack, train_
from recipes.theory.order import mixed
from recipes.theory.stacks import digits
from torch_meanfield import MeanFieldResNet, MeanFieldSequential
from torch_meanfield.theory import critical, diagnose
from torch_meanfield.theory.diagnosis.kernel import kernel_of
from torch_meanfield.theory.ntk import empirical_ntk
from torch_meanfield.theory.signal import length_map

IMAGES, LABELS = digits(24), torch.from_numpy(load_digits().target[:24])


def mlp(depth=12, width=128, activation=nn.Tanh, sigma_w=1.0, sigma_b=0.0):
    torch.manual_seed(0)
    layers = [nn.Flatten()]
    for i in range(depth):
        layers += [nn.Linear(64 if i == 0 else width, width), activation()]
    net = nn.Sequential(*layers, nn.Linear(width, 10))
    for m in net:
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=sigma_w / m.in_features**0.5)
            nn.init.normal_(m.bias, std=sigma_b)
    return net


def texts(found):
    return "\n".join(map(str, found.findings))


def test_every_column_is_what_a_plain_computation_gives():
    net = mlp(3, 64, nn.ReLU, sigma_w=2**0.5)
    found = diagnose(net, (IMAGES, LABELS))
    h, outs = IMAGES, []
    for m in net:
        h = m(h)
        if isinstance(m, nn.Linear):
            h.retain_grad()
            outs.append(h)
    loss = F.cross_entropy(h, LABELS)
    loss.backward()
    assert found.loss == pytest.approx(loss.item())
    assert [a.name for a in found.layers] == ["1", "3", "5", "7"]
    for a, h in zip(found.layers, outs, strict=True):
        m, x = net[int(a.name)], h.detach()
        products = x @ x.T
        off = (products.sum() - products.trace()) / (len(x) - 1) / products.trace()
        assert a.q == pytest.approx(x.square().mean().item(), rel=1e-4)
        assert a.correlation == pytest.approx(off.item(), abs=1e-4)
        assert a.gradient == pytest.approx(h.grad.norm().item(), rel=1e-4)
        both = m.weight.grad.square().sum() + m.bias.grad.square().sum()
        assert a.weight_gradient == pytest.approx(both.sqrt().item(), rel=1e-4)
        v = (m.weight * m.weight.grad).sum(0).detach()
        assert a.potential_spread == pytest.approx((len(v) * v.std()).item(), rel=1e-4)
    for a, h in zip(found.layers[:-1], outs, strict=False):
        assert a.activation == "relu"
        assert a.dead == pytest.approx((h <= 0).all(0).float().mean().item())
        assert a.chi == pytest.approx(1, rel=0.1)  # He: sigma_w^2 / 2
    k = empirical_ntk(net, IMAGES[:8])
    assert 0 < found.kernel.eigenvalues[0] <= torch.linalg.eigvalsh(k)[-1]


def test_predictions_are_those_of_the_theory():
    sigma_b = 0.3
    net = mlp(6, 512, nn.Tanh, sigma_w=1.2, sigma_b=sigma_b)
    found = diagnose(net, IMAGES, kernel_samples=0)
    a, b = found.layers[2], found.layers[3]
    assert float(length_map(torch.tanh, a.q, 1.2, sigma_b)) == pytest.approx(b.q, rel=0.1)
    deep = found.layers[-2]
    assert deep.chi * deep.critical_gain**2 == pytest.approx(1)
    assert deep.depth_scale == pytest.approx(1 / abs(math.log(deep.chi)), rel=0.05)
    # the gradient really shrinks by about chi in each layer
    measured = (found.layers[1].gradient / found.layers[-2].gradient) ** (2 / 4)
    assert measured == pytest.approx(math.prod(x.chi for x in found.layers[1:-2]) ** (1 / 4), rel=0.15)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (lambda: mlp(30, sigma_w=0.7), "gradients vanish by a factor"),
        (lambda: mlp(30, sigma_w=2.5), "gradients explode by a factor"),
        (lambda: mlp(16, sigma_w=0.9, sigma_b=0.5), "different inputs give nearly the same output"),
        (lambda: mlp(20, activation=nn.ReLU, sigma_w=3.0), "mean squares of outputs differ by a factor"),
        (lambda: mlp(30, activation=nn.ReLU, sigma_w=1e5), "the first layer whose output is not finite"),
    ],
)
def test_each_disease_is_named(net, expected):
    assert expected in texts(diagnose(net(), (IMAGES, LABELS), kernel_samples=0))


def test_dead_units_are_counted_also_where_the_activation_is_a_function():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(288, 10)

        def forward(self, x):
            return self.fc(F.relu(self.conv(x), inplace=True).flatten(1))

    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.conv.bias[:4] = -100
    found = diagnose(net, (IMAGES, LABELS))
    assert found.layers[0].dead == pytest.approx(0.5)
    assert "50 % of the units answer all inputs alike" in texts(found)


def test_a_critical_network_is_well():
    edge = critical(torch.tanh, 0.05)
    found = diagnose(mlp(20, 256, sigma_w=edge.sigma_w.item(), sigma_b=0.05), (IMAGES, LABELS))
    assert found.findings == ()
    assert "Nothing stands out." in str(found)


def test_batch_norm_without_skip_connections_is_predicted_and_measured():
    torch.manual_seed(0)
    layers = [nn.Flatten()]
    for i in range(16):
        layers += [nn.Linear(64 if i == 0 else 256, 256), nn.BatchNorm1d(256), nn.ReLU()]
    found = diagnose(
        nn.Sequential(*layers, nn.Linear(256, 10)), (digits(256), torch.arange(256) % 10), kernel_samples=0
    )
    inner = found.layers[:-1]
    assert all(a.chi == pytest.approx(math.pi / (math.pi - 1), rel=0.02) for a in inner)
    rate = (inner[2].gradient / inner[-1].gradient) ** (2 / (len(inner) - 3))
    assert rate == pytest.approx(inner[5].chi, rel=0.05)
    deeper = nn.Sequential(
        nn.Flatten(), *(m for _ in range(34) for m in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()))
    )
    assert "batch norm does this without skip connections" in texts(diagnose(deeper, digits(64), kernel_samples=0))


def test_mean_field_layers_show_horizon_and_steps_and_small_ones_are_named():
    torch.manual_seed(0)
    model = MeanFieldResNet(20, in_chans=1, horizon=1.0)
    found = diagnose(model, (IMAGES, LABELS))
    assert [(p.name, len(p.steps)) for p in found.particles] == [
        ("stage1.particles", 3),
        ("stage2.particles", 2),
        ("stage3.particles", 2),
    ]
    assert found.particles[0].steps == pytest.approx((1 / 3,) * 3)
    sums = [a for a in found.layers if a.kind == "skip"]
    assert len(sums) == 3 + 2 + 2 + 2
    assert "horizon 1, steps 0.333 to 0.333" in str(found)
    model.mean_field_layers()["stage1.particles"].set_tau_([0.5, 0.501, 1.0])
    assert "1 of 3 particles take steps below 2% of the mean" in texts(diagnose(model, (IMAGES, LABELS)))


def test_the_model_and_the_process_stay_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10)
    )
    model[1].eval()
    fired = []
    model[0].register_forward_hook(lambda *_: fired.append(1))
    F.cross_entropy(model(IMAGES), LABELS).backward()
    fired.clear()
    images = IMAGES.clone()
    before, grads = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    one = diagnose(model, (images, LABELS))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert torch.equal(images, IMAGES) and images.grad is None and fired == []
    assert str(one) == str(diagnose(model, (images, LABELS)))  # dropout draws alike


def test_it_works_under_no_grad_and_leaves_a_stack_trainable():
    layer = MeanFieldSequential(*(nn.Linear(8, 8) for _ in range(3)))
    with torch.no_grad():
        found = diagnose(layer, torch.randn(6, 8))
    assert len(found.particles[0].steps) == 3
    layer.set_tau_([3.0, 1.0, 2.0])
    assert layer.tau.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_networks_of_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    size = {"img_size": 32} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=10, **size)
    found = diagnose(model, torch.randn(4, 3, 32, 32), kernel_samples=2)
    assert len(found.layers) > 20 and all(math.isfinite(a.q) for a in found.layers)
    assert sum(a.kind == "skip" for a in found.layers) >= 8
    assert len(found.kernel.eigenvalues) == 2 and not found.kernel.skipped


def test_what_the_kernel_could_not_do_is_said():
    found = diagnose(mlp(3), IMAGES, kernel_bytes=1000)
    assert "not computed, ValueError" in str(found) and len(found.kernel.eigenvalues) == 0


def test_it_draws_one_figure(tmp_path):
    pytest.importorskip("matplotlib")
    for model in (mlp(4), MeanFieldResNet(14, in_chans=1)):
        path = tmp_path / "diagnosis.png"
        diagnose(model, (IMAGES, LABELS)).plot().savefig(path)
        assert path.stat().st_size > 10_000


def test_losses_by_the_kind_of_target():
    net = mlp(2)
    x = IMAGES
    assert diagnose(net, x, kernel_samples=0).loss_name == "random linear functional"
    target = torch.randn(24, 10)
    found = diagnose(net, (x, target), kernel_samples=0)
    assert found.loss == pytest.approx(F.mse_loss(net(x), target).item(), rel=1e-5)
    given = diagnose(net, x, loss=lambda out: out.square().mean(), kernel_samples=0)
    assert (given.loss_name, given.loss) == ("given loss", pytest.approx(net(x).square().mean().item(), rel=1e-5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diagnose(3, IMAGES), TypeError, "must be a torch.nn.Module, got int"),
        (lambda: diagnose(mlp(2), "x"), TypeError, "a tensor, or a pair"),
        (lambda: diagnose(mlp(2), IMAGES[:1]), ValueError, "holds 1 input.*correlations need at least two"),
        (lambda: diagnose(mlp(2), (IMAGES, LABELS[:3])), ValueError, "24 inputs and 3 targets"),
        (lambda: diagnose(mlp(2), (IMAGES, torch.randn(24, 3))), ValueError, "pass loss="),
        (lambda: diagnose(mlp(2), IMAGES, loss=lambda out: out), ValueError, "must return a scalar"),
        (lambda: diagnose(mlp(2), IMAGES, kernel_samples=-1), ValueError, "kernel_samples must be"),
        (lambda: diagnose(nn.Sequential(nn.ReLU()), IMAGES), ValueError, "no layer with weights"),
        (lambda: diagnose(mlp(2).requires_grad_(False), IMAGES), ValueError, "no parameter that requires a gradient"),
        (lambda: diagnose(mlp(2).to("meta"), IMAGES), ValueError, "batch is on cpu, the model on meta"),
        (
            lambda: diagnose(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta")), torch.randn(2, 3)),
            ValueError,
            "several devices .cpu, meta.",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_each_block_is_worth_and_each_exchange_costs():
    layer, teacher = deep_stack(6, 0), Teacher(0)
    train_(layer, teacher, 60, size=64)
    x, y = teacher.batch(256)
    (stack,) = diagnose(layer, (x, y), kernel_samples=0).particles

    def loss(order):
        h = x
        for i in order:
            h = h + layer[i](h)
        return F.mse_loss(h, y).item()

    with torch.no_grad():
        before, n = loss(range(6)), range(6)
        removed = [loss([i for i in n if i != k]) - before for k in n]
        exchanged = [loss([*n[:k], k + 1, k, *n[k + 2 :]]) - before for k in range(5)]
        h, way = x, 0.0
        for block in layer:
            way += (block(h).norm() / h.norm()).item()
            h = h + block(h)
    assert stack.removal == pytest.approx(removed, rel=1e-6)
    assert stack.effective_horizon == pytest.approx(way, rel=1e-6)
    error = (torch.tensor(stack.exchange) - torch.tensor(exchanged)).norm() / torch.tensor(exchanged).norm()
    assert error < 0.25  # four probes, and the third order


def test_blocks_that_do_nothing_and_blocks_in_a_wrong_order_are_named():
    layer, teacher = deep_stack(6, 0), Teacher(0)
    train_(layer, teacher, 60, size=64)
    wrong = diagnose(mixed(layer, "random", 1), teacher.batch(256), kernel_samples=0)
    assert "theory.recover_order_ many" in texts(wrong)
    with torch.no_grad():
        layer[2].v.zero_()
    silent = texts(diagnose(layer, teacher.batch(256), kernel_samples=0))
    assert "1 of 6 blocks can be left out" in silent and "(block 2: +0); if the network is trained" in silent
    for branch in layer:
        with torch.no_grad():
            branch.v.mul_(1e-3)
    assert "blocks together change the stream by" in texts(diagnose(layer, teacher.batch(256), kernel_samples=0))


def test_dormant_units_are_named():
    net = mlp(3, 40, nn.ReLU, sigma_w=2**0.5)
    with torch.no_grad():
        net[3].weight[:10] *= 1e-4
        net[3].bias[:10] = 0.1
    found = diagnose(net, (IMAGES, LABELS), kernel_samples=0)
    spread = net[:5](IMAGES).detach().std(0, correction=0)
    share = (spread <= 0.025 * spread.mean()).float().mean().item()
    assert share >= 0.25 and found.layers[1].dormant == pytest.approx(share) and found.layers[1].dead < 0.1
    assert f"3: {100 * share:.0f} % of the units are dormant or nearly so" in texts(found)


def test_a_stack_that_runs_twice_or_not_at_all_has_steps_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = (MeanFieldSequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))

        def forward(self, x):
            return self.used(self.used(x))

    used, idle = diagnose(Twice(), torch.randn(8, 4)).particles
    assert len(used.steps) == len(idle.steps) == 2 and used.removal == idle.removal == ()


def test_running_statistics_and_the_kernel_do_not_see_the_passes_without_a_block():
    torch.manual_seed(0)
    model = MeanFieldResNet(14, in_chans=1)
    one = diagnose(model, (IMAGES, LABELS)).kernel.eigenvalues
    trained = copy.deepcopy(model)
    trained(IMAGES)
    k = kernel_of(trained, IMAGES[:8], torch.empty(24, 10), 2 << 30).eigenvalues
    torch.testing.assert_close(one, k, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64), ("cpu", torch.float16)])
def test_neither_the_default_device_nor_the_default_dtype_matters(device, dtype):
    torch.manual_seed(0)
    model = MeanFieldResNet(14, in_chans=1)
    expected = str(diagnose(model, (IMAGES, LABELS)))
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            assert str(diagnose(model, (IMAGES, LABELS))) == expected
    finally:
        torch.set_default_dtype(torch.float32)
