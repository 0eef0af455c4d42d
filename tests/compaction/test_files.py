"""Compacted models on file: the same outputs from a network made anew, no code, and what is refused."""

import copy
import warnings
import zipfile

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import FileAccessError, FileError, MissingFileError


class Net(nn.Module):
    """Convolutions with and without bias, normalisation, attention, a tied layer, a buffer beside the state."""

    def __init__(self, width=16):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, width, 3, bias=False)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up = nn.Linear(width, 32, bias=False)
        self.down = nn.Linear(32, 3, bias=False)
        self.again = self.down
        self.register_buffer("shift", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)) + self.shift[:, None, None])
        x = self.second(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.again(torch.sigmoid(self.up(x.mean(1))))


def made(seed=0, width=16):
    torch.manual_seed(seed)
    return Net(width).eval()


def holed(model):
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.second.weight[:, 2:5] = 0  # nothing reads these filters
        model.up.weight[20:] = 0  # constants of sigmoid(0), which the next layer gets as a bias
        for k in range(3):
            model.attention.in_proj_weight[16 * k + 8 : 16 * k + 12] = 0
            model.attention.in_proj_bias[16 * k + 8 : 16 * k + 12] = 0
        model.attention.out_proj.weight[:, 8:12] = 0
    return model


@pytest.fixture(scope="module")
def small():
    x = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    found = rs.compact(holed(made()), x).model
    assert found.down.weight.shape == (3, 20)
    assert found.down.bias is not None
    assert found.attention.num_heads == 3
    assert found.first.out_channels == 5
    return found, x


def test_a_network_made_anew_takes_the_widths_of_the_file(small, tmp_path):
    small, x = small
    file = rs.save(small, tmp_path / "small.pt")
    fresh = made(seed=1).train()
    before = copy.deepcopy(fresh.state_dict())
    found = rs.load(file, fresh)
    assert found is not fresh
    assert found.training
    assert all(torch.equal(t, before[name]) for name, t in fresh.state_dict().items())
    torch.testing.assert_close(found.eval()(x), small(x), rtol=0, atol=0)
    assert found.again is found.down
    assert repr(found) == repr(small)
    assert not torch.allclose(fresh.eval()(x), small(x))
    with torch.no_grad():  # a copy, whatever is done with the file's tensors
        found.down.weight.zero_()
    torch.testing.assert_close(rs.load(file, fresh).eval()(x), small(x), rtol=0, atol=0)


def test_it_trains_on_and_can_be_compacted_and_saved_again(small, tmp_path):
    small, x = small
    found = rs.load(rs.save(small, tmp_path / "small.pt"), made())
    optimizer = torch.optim.Adam(found.parameters())
    found.train()(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        found.up.weight[:7] = 0
    again = rs.compact(found.eval(), x).model
    assert again.down.in_features == 13
    last = rs.load(rs.save(again, tmp_path / "smaller.pt"), made())
    torch.testing.assert_close(last(x), again(x), rtol=0, atol=0)


def test_dtypes_are_those_of_the_given_model(small, tmp_path):
    small, x = small
    found = rs.load(rs.save(small, tmp_path / "small.pt"), made().double())
    assert {p.dtype for p in found.parameters()} == {torch.float64}
    torch.testing.assert_close(found(x.double()), small(x).double(), rtol=1e-5, atol=1e-5)


def test_wrapped_models_are_written_by_their_own_names(small, tmp_path):
    small, x = small
    file = rs.save(torch.optim.swa_utils.AveragedModel(small), tmp_path / "small.pt")
    torch.testing.assert_close(rs.load(file, made())(x), small(x))


def test_the_file_holds_no_code(small, tmp_path):
    file = rs.save(small[0], tmp_path / "small.pt")
    data = torch.load(file, weights_only=True)
    assert data["kind"] == "network"
    assert data["attentions"] == ["attention"]
    with zipfile.ZipFile(file) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert b"restrain" not in pickled
    assert b"Conv" not in pickled


def test_what_does_not_fit_is_refused(small, tmp_path):
    small, _ = small
    file = rs.save(small, tmp_path / "small.pt")
    with pytest.raises(FileError, match=r"'second.weight' has the shape \(16, 5, 3, 3\) in the file and \(12, 8, 3, 3"):
        rs.load(file, made(width=12))
    with pytest.raises(FileError, match=r"another model than this Linear: only .* has"):
        rs.load(file, nn.Linear(2, 2))
    other = made()
    other.more = nn.Linear(2, 2)
    with pytest.raises(FileError, match=r"only the model has 'more\.bias'"):
        rs.load(file, other)
    with pytest.raises(FileError, match=r"rs.load\(path, model\) with a network"):
        rs.load(file)
    with pytest.raises(FileError, match=r"takes the network as an nn\.Module; got OrderedDict"):
        rs.load(file, small.state_dict())
    with pytest.raises(MissingFileError):
        rs.load(tmp_path / "none.pt", made())
    with torch.device("meta"):
        blank = Net()
    with pytest.raises(FileError, match="on the meta device"):
        rs.load(file, blank)


def test_damaged_and_foreign_files_are_refused(small, tmp_path):
    file = rs.save(small[0], tmp_path / "small.pt")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(FileError, match=r"small\.pt"):
        rs.load(file, made())
    wrong = bytearray(content)
    wrong[len(content) // 2] ^= 1
    file.write_bytes(wrong)
    with pytest.raises(FileError, match="damaged"):
        rs.load(file, made())
    torch.save(made().state_dict(), file)
    with pytest.raises(FileError, match=r"isn't a network written by rs\.save"):
        rs.load(file, made())
    torch.save(made(), file)
    with pytest.raises(FileError, match=r"small\.pt"):
        rs.load(file, made())
    data = {"kind": "network", "version": 2, "tensors": {}, "missing_ok": [], "attentions": []}
    torch.save(data, file)
    with pytest.raises(FileError, match="another version"):
        rs.load(file, made())
    torch.save({**data, "version": 1, "attentions": [3]}, file)
    with pytest.raises(FileError, match="other entries"):
        rs.load(file, made())


def test_only_models_are_written(tmp_path):
    with pytest.raises(FileError, match=r"rs.save\(model, path\) writes an nn.Module.*; got list"):
        rs.save([], tmp_path / "x")
    with pytest.raises(FileAccessError):
        rs.save(made(), tmp_path / "no" / "folder")

    class Stateful(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(FileError, match="'_extra_state' of Stateful isn't a tensor"):
        rs.save(Stateful(2, 2), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_keyword_models_are_written_by_their_own_save(tmp_path):
    model = rs.Classifier([3, 4, 2], progress=False)
    x = torch.randn(8, 3).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train((x, (x[:, 0] > 0).astype(int)), epochs=1)
    file = rs.save(model, tmp_path / "model.safetensors")
    assert (rs.load(file).predict(x) == model.predict(x)).all()


@pytest.mark.filterwarnings("ignore")
def test_layers_of_their_own_widths_of_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=50, n_positions=16)

    def gpt2(seed):
        torch.manual_seed(seed)
        return transformers.GPT2LMHeadModel(config).eval()

    model, ids = gpt2(0), torch.arange(6).reshape(1, 6)
    with torch.no_grad():
        mlp, attention = model.transformer.h[0].mlp, model.transformer.h[1].attn
        mlp.c_proj.weight[50:] = 0
        attention.c_proj.weight[:8] = 0
    result = rs.compact(model, (ids,))
    assert "rs.save(model, path)" in str(result.report)
    found = rs.load(rs.save(result.model, tmp_path / "gpt2.pt"), gpt2(1))
    torch.testing.assert_close(found(ids).logits, result.model(ids).logits, rtol=0, atol=0)
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert found.transformer.h[0].mlp.c_fc.nf == 50
    assert found.transformer.h[1].attn.num_heads == 3
    assert found.lm_head.weight is found.transformer.wte.weight
