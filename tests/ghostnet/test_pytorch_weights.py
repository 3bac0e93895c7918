"""Names, layouts and files of PyTorch weights. That the numbers mean the same is in tests/parity."""

import itertools
import json
import logging
import re
import subprocess
import sys
import types

import keras
import ml_dtypes
import numpy as np
import pytest

import ghostnet
from ghostnet import article, load_pytorch_weights, to_pytorch_state_dict
from ghostnet.pytorch import main

# Some keys of timm 1.0.31's ghostnet_100 and of the authors' ghostnet(), which are the same, with their shapes.
SHAPES = {
    'conv_stem.weight': (16, 3, 3, 3), 'bn1.running_var': (16,),
    'blocks.0.0.ghost1.primary_conv.0.weight': (8, 16, 1, 1), 'blocks.0.0.ghost2.cheap_operation.1.bias': (8,),
    'blocks.1.0.conv_dw.weight': (48, 1, 3, 3), 'blocks.1.0.bn_dw.running_mean': (48,),
    'blocks.1.0.shortcut.0.weight': (16, 1, 3, 3), 'blocks.1.0.shortcut.2.weight': (24, 16, 1, 1),
    'blocks.1.0.shortcut.3.weight': (24,), 'blocks.3.0.conv_dw.weight': (72, 1, 5, 5),
    'blocks.3.0.se.conv_reduce.weight': (20, 72, 1, 1), 'blocks.3.0.se.conv_expand.bias': (72,),
    'blocks.6.0.ghost1.cheap_operation.0.weight': (100, 1, 3, 3), 'blocks.6.3.shortcut.1.bias': (80,),
    'blocks.6.4.ghost2.primary_conv.0.weight': (56, 672, 1, 1), 'blocks.7.0.shortcut.0.weight': (112, 1, 5, 5),
    'blocks.8.3.se.conv_reduce.bias': (240,), 'blocks.9.0.conv.weight': (960, 160, 1, 1),
    'blocks.9.0.bn1.weight': (960,), 'conv_head.weight': (1280, 960, 1, 1), 'conv_head.bias': (1280,),
    'classifier.weight': (1000, 1280), 'classifier.bias': (1000,),
}


@pytest.fixture(scope='module')
def model():
    return ghostnet.ghostnet(10, 0.25, image_size=None)


@pytest.fixture(scope='module')
def state(model):
    """Other weights of the same model, as PyTorch would give them."""
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=value.shape).astype(np.float32) for key, value in to_pytorch_state_dict(model).items()}


def assert_holds(model, state):
    exported = to_pytorch_state_dict(model)
    assert exported.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(exported[key], value, key)


def test_names_and_shapes_are_those_of_pytorch():
    model = ghostnet.ghostnet()
    state = to_pytorch_state_dict(model, 'timm')
    assert list(state) == list(to_pytorch_state_dict(model, 'official'))
    assert SHAPES.items() <= {key: value.shape for key, value in state.items()}.items()
    assert sum(value.size for value in state.values()) == 5_182_508 + 21_968
    assert {value.dtype for value in state.values()} == {np.dtype('float32')}


def test_kernels_are_transposed_as_their_layer_needs(model, state):
    load_pytorch_weights(model, state)
    ours = {v.path: v.numpy() for v in model.weights}
    theirs = state['conv_stem.weight']
    np.testing.assert_array_equal(ours['stem/conv/kernel'], np.einsum('oihw->hwio', theirs))
    theirs = state['blocks.3.0.conv_dw.weight']
    np.testing.assert_array_equal(ours['block_4/depthwise/conv/kernel'], np.einsum('cihw->hwci', theirs))
    np.testing.assert_array_equal(ours['classifier/kernel'], state['classifier.weight'].T)
    np.testing.assert_array_equal(ours['block_10/shortcut_pointwise/bn/moving_variance'],
                                  state['blocks.6.3.shortcut.3.running_var'])


def test_both_forms_take_and_give_the_same_weights(model, state):
    as_class = ghostnet.GhostNet(10, 0.25)
    for form in (model, as_class):
        assert load_pytorch_weights(form, state) == {'missing': [], 'left over': [], 'misshapen': []}
        assert_holds(form, state)
    for a, b in zip(model.get_weights(), as_class.get_weights()):
        np.testing.assert_array_equal(a, b)


class Tensor:
    """As much of a PyTorch tensor as is needed to turn one into an array."""

    def __init__(self, array):
        self.array = array

    def detach(self):
        return self

    cpu = float = detach

    def __array__(self, dtype=None, copy=None):
        return self.array.astype(dtype)


def test_counters_wrapping_and_tensors_are_taken(model, state):
    wrapped = {'state_dict': {key: Tensor(value) for key, value in state.items()} | {
        'bn1.num_batches_tracked': np.array(7)}, 'epoch': 3}
    load_pytorch_weights(model, wrapped)
    assert_holds(model, state)
    parallel = {'model': {f'module.{key}': value + 1 for key, value in state.items()}, 'args': None}
    load_pytorch_weights(model, parallel)
    assert_holds(model, {key: value + 1 for key, value in state.items()})


@pytest.fixture
def broken(state):
    broken = {key: value + 1 for key, value in state.items()}
    del broken['bn1.bias'], broken['blocks.8.3.se.conv_reduce.weight']
    return broken | {'classifier.weight': np.zeros((1000, 1280), np.float32),
                     'blocks.2.0.ghost1.short_conv.0.weight': np.zeros((72, 24, 1, 1), np.float32)}


def test_whatever_does_not_fit_is_listed_at_once_and_nothing_is_loaded(model, state, broken):
    load_pytorch_weights(model, state)
    with pytest.raises(ValueError, match='the state dict does not fit') as error:
        load_pytorch_weights(model, broken)
    assert_holds(model, state)
    message = str(error.value)
    assert '2 missing: bn1.bias, blocks.8.3.se.conv_reduce.weight' in message
    assert '1 left over: blocks.2.0.ghost1.short_conv.0.weight' in message
    assert '1 misshapen: classifier.weight (1000, 1280) instead of (10, 1280)' in message
    assert '\n' not in message


def test_not_strict_loads_what_fits_and_tells_the_rest(model, state, broken, caplog):
    load_pytorch_weights(model, state)
    with caplog.at_level(logging.WARNING):
        problems = load_pytorch_weights(model, broken, strict=False)
    assert problems == {'missing': ['bn1.bias', 'blocks.8.3.se.conv_reduce.weight'],
                        'left over': ['blocks.2.0.ghost1.short_conv.0.weight'],
                        'misshapen': ['classifier.weight (1000, 1280) instead of (10, 1280)']}
    assert 'bn1.bias' in caplog.text
    kept = {'bn1.bias', 'blocks.8.3.se.conv_reduce.weight', 'classifier.weight'}
    assert_holds(model, {key: value if key in kept else broken[key] for key, value in state.items()})


def test_another_network_has_no_names():
    with pytest.raises(ValueError, match='must come from ghostnet.GhostNet or ghostnet.ghostnet'):
        to_pytorch_state_dict(article.ghostnet(10))
    with pytest.raises(ValueError, match='must come from'):
        load_pytorch_weights(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), {})


def test_another_naming_is_refused(model):
    with pytest.raises(ValueError, match="naming is 'keras'; it must be one of timm, official"):
        to_pytorch_state_dict(model, 'keras')


def write_safetensors(path, tensors, dtype):
    """As the format's specification says: uint64 length of the header, JSON header, data; little-endian."""
    header, data = {'__metadata__': {'format': 'pt'}}, b''
    for key, value in tensors.items():
        header[key] = {'dtype': dtype, 'shape': value.shape, 'data_offsets': [len(data), len(data) + value.nbytes]}
        data += value.tobytes()
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, 'little') + header + data)


@pytest.mark.parametrize(('name', 'dtype'), [
    ('F64', np.float64), ('F32', np.float32), ('F16', np.float16), ('BF16', ml_dtypes.bfloat16)])
def test_safetensors_are_read(model, state, tmp_path, name, dtype):
    tensors = {key: value.astype(dtype) for key, value in state.items()}
    write_safetensors(tmp_path / 'weights.safetensors', tensors, name)
    load_pytorch_weights(model, tmp_path / 'weights.safetensors')
    assert_holds(model, {key: value.astype(np.float32) for key, value in tensors.items()})


@pytest.mark.parametrize('content', [b'', b'no header at all', (2).to_bytes(8, 'little') + b'[]',
                                     (99).to_bytes(8, 'little') + b'{}'])
def test_a_damaged_safetensors_file_is_named(model, tmp_path, content):
    (tmp_path / 'weights.safetensors').write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / 'weights.safetensors'))):
        load_pytorch_weights(model, tmp_path / 'weights.safetensors')


def test_npz_is_read_and_never_unpickled(model, state, tmp_path):
    np.savez(tmp_path / 'weights.npz', **state)
    load_pytorch_weights(model, str(tmp_path / 'weights.npz'))
    assert_holds(model, state)
    np.savez(tmp_path / 'evil.npz', **state | {'bn1.bias': np.array([print], object)})
    with pytest.raises(ValueError, match='allow_pickle=False'):
        load_pytorch_weights(model, tmp_path / 'evil.npz')


@pytest.mark.parametrize('suffix', ['pth', 'pt'])
def test_pth_goes_through_torch_and_its_safe_unpickler(model, state, monkeypatch, suffix):
    calls = []
    torch = types.SimpleNamespace(load=lambda path, **kwargs: calls.append((path, kwargs)) or state)
    monkeypatch.setitem(sys.modules, 'torch', torch)
    load_pytorch_weights(model, f'weights.{suffix}')
    assert calls == [(f'weights.{suffix}', {'map_location': 'cpu', 'weights_only': True})]
    assert_holds(model, state)


def test_pth_without_torch_says_what_else_can_be_read(model, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(ImportError, match='weights.pth needs torch: install it, or give .safetensors or .npz'):
        load_pytorch_weights(model, 'weights.pth')


def test_another_kind_of_file_is_refused(model):
    with pytest.raises(ValueError, match='weights.onnx is no file of PyTorch weights: it must be .pth, .pt'):
        load_pytorch_weights(model, 'weights.onnx')


def test_the_command_line_converts_there_and_back(state, tmp_path):
    np.savez(tmp_path / 'a.npz', **state)
    size = ['--width=0.25', '--num_classes=10']
    files = [str(tmp_path / name) for name in ('a.npz', 'b.weights.h5', 'c.keras', 'd.npz')]
    for source, target in itertools.pairwise(files):
        main([source, target, *size])
    with np.load(files[-1]) as converted:
        assert set(converted) == set(state)
        for key, value in state.items():
            np.testing.assert_array_equal(converted[key], value)


@pytest.mark.parametrize(('argv', 'message'), [
    (['a.npz', 'b.onnx'], 'target is b.onnx; it must be .npz, .keras or .weights.h5'),
    (['a.onnx', 'b.npz'], 'a.onnx is no file of PyTorch weights'),
    (['nowhere.npz', 'b.npz'], 'nowhere.npz'),
    (['a.npz', 'b.npz', '--width=0'], 'ghostnet.width is 0.0')])
def test_the_command_line_refuses_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_command_line_runs_as_a_module():
    run = subprocess.run([sys.executable, '-m', 'ghostnet.pytorch', '--help'], capture_output=True, text=True)
    assert run.returncode == 0
    assert '--num_classes' in run.stdout
    assert 'RuntimeWarning' not in run.stderr
