"""train.initial_weights: a run starts from what fits of a checkpoint or a PyTorch file, or says that nothing does."""

import numpy as np
import pytest
from cli_harness import assert_refused
from workdir_reader import tensors

import ghostnet


def test_a_new_run_starts_from_the_weights_of_another(command, tmp_path, trained, folder, recipe, snapshot):
    before, weights = snapshot(trained), trained / 'checkpoints' / 'ckpt-00000006'
    code, _, stderr = command(  # the first step's rate is zero
        f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={tmp_path / "work"}',
        '--gin_param=train.max_steps=1', '--gin_param=ghostnet.num_classes=6', '--gin_param=train.ema_decay=0.9',
        f"--gin_param=train.initial_weights='{weights}'")
    assert code == 0, stderr
    (said,) = (line for line in stderr.splitlines() if str(weights) in line and 'start from' in line)
    assert 'other shape params/classifier/bias, params/classifier/kernel' in said and 'missing none' in said
    values, others = tensors(tmp_path / 'work'), tensors(trained)
    assert values['step'] == 1 and values['position'] == 8
    for name, value in others.items():
        if name.startswith('params/') and 'classifier' not in name:
            np.testing.assert_array_equal(values[name], value, err_msg=name)
            np.testing.assert_array_equal(values[f'ema/{name[7:]}'], value, err_msg=name)
    assert values['params/classifier/bias'].shape == (6,)
    assert snapshot(trained) == before


def test_a_new_run_starts_from_a_pytorch_file(command, tmp_path, folder, recipe):
    state = ghostnet.to_pytorch_state_dict(ghostnet.GhostNet(9, 0.25))
    np.savez(tmp_path / 'weights.npz', **state)
    code, _, stderr = command(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={tmp_path / "work"}',
                              '--gin_param=train.max_steps=1',
                              f"--gin_param=train.initial_weights='{tmp_path / 'weights.npz'}'")
    assert code == 0, stderr
    assert 'classifier.weight' in stderr
    kernel = tensors(tmp_path / 'work')['params/stem/conv/kernel']
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), state['conv_stem.weight'])


@pytest.mark.parametrize('name', ['nowhere.npz', 'nowhere', 'nothing.txt', 'cut.npz', 'damaged.npz', 'other.npz'])
def test_weights_that_are_none(command, tmp_path, folder, recipe, name):
    (tmp_path / 'nothing.txt').write_text('no weights')
    np.savez(tmp_path / 'other.npz', foo=np.zeros(3))
    whole = (tmp_path / 'other.npz').read_bytes()
    (tmp_path / 'cut.npz').write_bytes(whole[:-10])
    (tmp_path / 'damaged.npz').write_bytes(whole.replace(bytes(24), b'x' * 24))
    assert_refused(command(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={tmp_path / "work"}',
                           f"--gin_param=train.initial_weights='{tmp_path / name}'"),
                   'train.initial_weights', tmp_path / name)
    assert not (tmp_path / 'work').exists()
