"""Each optimizer against PyTorch's or timm's own over 50 steps of changing rates; weight decay on kernels by groups.

PyTorch and TensorFlow stand in environments of their own: PARITY_PYTHON names an interpreter that has torch and timm.

    PARITY_PYTHON=/path/to/python pytest tests/parity
"""
import itertools
import json
import os
import subprocess

import numpy as np
import pytest
import tensorflow as tf

from trainer import optimizer, schedule

PYTHON = os.environ.get('PARITY_PYTHON')
pytestmark = pytest.mark.skipif(not PYTHON, reason='PARITY_PYTHON names no interpreter with torch (the extra `parity`)')
# Each with the order of axes that PyTorch keeps it in, where the unit of adaptive clipping is the first one.
SHAPES = {'stem/conv/kernel': (3, 3, 2, 4), 'stem/bn/gamma': (4,), 'stem/bn/beta': (4,),
          'depthwise/conv/kernel': (3, 3, 4, 1), 'head/kernel': (4, 5), 'head/bias': (5,), 'classifier/kernel': (5, 6),
          'classifier/bias': (6,)}
TO_TORCH = {'stem/conv/kernel': (3, 2, 0, 1), 'depthwise/conv/kernel': (2, 3, 0, 1), 'head/kernel': (1, 0),
            'classifier/kernel': (1, 0)}
NUM_STEPS = 50

# (ours, its settings, theirs, its settings, clipping); torch refuses Nesterov without momentum, which is plain SGD.
CASES = [('sgd', {'momentum': m, 'nesterov': n, 'weight_decay': w},
          'torch.optim.SGD', {'momentum': m, 'nesterov': n and m > 0, 'weight_decay': w}, {})
         for m, n, w in itertools.product((0.0, 0.9), (False, True), (0.0, 4e-5, 1e-2))]
CASES += [('rmsprop', {'decay': d, 'momentum': m, 'epsilon': e, 'weight_decay': w},
           'timm.optim.RMSpropTF', {'alpha': d, 'momentum': m, 'eps': e, 'weight_decay': w}, {})
          for d, m, e, w in ((0.9, 0.9, 1e-3, 1e-5), (0.9, 0.9, 1e-10, 0.0), (0.95, 0.0, 1e-3, 1e-2))]
CASES += [('adamw', {'beta_1': b, 'beta_2': c, 'epsilon': e, 'weight_decay': w},
           'torch.optim.AdamW', {'betas': [b, c], 'eps': e, 'weight_decay': w}, {})
          for b, c, e, w in ((0.9, 0.999, 1e-8, 0.05), (0.6, 0.99, 1e-3, 0.1), (0.9, 0.999, 1e-8, 0.0))]
# Theirs clips by itself; it adapts what has no decay only if told to, which kernels are and all else is not.
CASES += [('lamb', {'beta_1': b, 'beta_2': c, 'epsilon': e, 'weight_decay': w},
           'timm.optim.Lamb', {'betas': [b, c], 'eps': e, 'weight_decay': w, 'always_adapt': True, 'max_grad_norm': n},
           {'norm': n})
          for b, c, e, w, n in ((0.9, 0.999, 1e-6, 0.05, None), (0.9, 0.999, 1e-6, 0.05, 1.0),
                                (0.8, 0.99, 1e-3, 0.0, None))]
CASES += [('sgd', {'momentum': 0.9, 'nesterov': True, 'weight_decay': 4e-5},
           'torch.optim.SGD', {'momentum': 0.9, 'nesterov': True, 'weight_decay': 4e-5}, {'adaptive': factor})
          for factor in (0.01, 0.2, 1.0)]
SCRIPT = """
import json, sys
import numpy as np
import timm.optim, timm.utils
import torch

torch.set_num_threads(1)
cases = json.loads(sys.argv[2])
with np.load(sys.argv[1]) as archive:
    arrays = dict(archive)
initial = {key[2:]: a for key, a in arrays.items() if key.startswith('p/')}
kernels_only = {'weight_decay': 0.0, 'always_adapt': False}
results = {}
for i, (_, _, name, settings, clipping) in enumerate(cases):
    params = {path: torch.tensor(a, requires_grad=True) for path, a in initial.items()}
    groups = [{'params': [p], **({} if path.endswith('kernel') else
                                 {key: value for key, value in kernels_only.items() if key in settings})}
              for path, p in params.items()]
    module, cls = name.rsplit('.', 1)
    optimizer = getattr({'torch.optim': torch.optim, 'timm.optim': timm.optim}[module], cls)(groups, lr=1.0, **settings)
    for step, rate in enumerate(arrays['rates']):
        for group in optimizer.param_groups:
            group['lr'] = float(rate)
        for path, p in params.items():
            p.grad = torch.tensor(arrays['g/' + path][step])
        if 'adaptive' in clipping:  # without the last two, as timm's train.py has it
            timm.utils.adaptive_clip_grad(list(params.values())[:-2], clipping['adaptive'])
        optimizer.step()
    results.update({f'{i}/{path}': p.detach().numpy() for path, p in params.items()})
np.savez(sys.argv[3], **results)
"""


def to_torch(path, a, num_leading=0):
    leading = list(range(num_leading))
    return np.transpose(a, [*leading, *(axis + num_leading for axis in TO_TORCH[path])]) if path in TO_TORCH else a


@pytest.fixture(scope='module')
def data():
    rng = np.random.default_rng(0)
    rate = schedule.cosine(0.2, num_steps=NUM_STEPS, warmup_epochs=5)
    return {'rates': np.array([rate(tf.constant(step)).numpy() for step in range(NUM_STEPS)]),
            **{f'p/{path}': rng.standard_normal(shape).astype(np.float32) for path, shape in SHAPES.items()},
            **{f'g/{path}': rng.standard_normal((NUM_STEPS, *shape)).astype(np.float32)
               for path, shape in SHAPES.items()}}


@pytest.fixture(scope='module')
def theirs(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp('torch_optimizers')
    np.savez(directory / 'in.npz', **{key: to_torch(key[2:], a, num_leading=int(key.startswith('g/')))
                                      for key, a in data.items()})
    run = subprocess.run([PYTHON, '-c', SCRIPT, directory / 'in.npz', json.dumps(CASES), directory / 'out.npz'],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with np.load(directory / 'out.npz') as archive:
        return dict(archive)


@pytest.mark.parametrize('number', range(len(CASES)), ids=[f'{case[0]}-{number}' for number, case in enumerate(CASES)])
def test_fifty_steps(data, theirs, number):
    name, settings, _, _, clipping = CASES[number]
    init, update = getattr(optimizer, name)(**settings)
    update = tf.function(update)
    params = {path: tf.constant(data[f'p/{path}']) for path in SHAPES}
    slots = init(params)
    for step, rate in enumerate(data['rates']):
        grads = {path: tf.constant(data[f'g/{path}'][step]) for path in SHAPES}
        if clipping.get('norm') is not None:
            grads = optimizer.clip_by_global_norm(grads, tf.linalg.global_norm(list(grads.values())), clipping['norm'])
        if 'adaptive' in clipping:
            grads = optimizer.clip_adaptively(grads, params, clipping['adaptive'])
        params, slots = update(grads, slots, params, tf.constant(rate), tf.constant(step, tf.int64))
    differences = {}
    for path, p in params.items():
        p, expected = to_torch(path, p.numpy()), np.float64(theirs[f'{number}/{path}'])
        moved = np.linalg.norm(expected - to_torch(path, data[f'p/{path}']))
        assert moved > (0.01 if 'adaptive' in clipping else 0.1) * np.linalg.norm(expected), path
        differences[path] = np.linalg.norm(p - expected) / np.linalg.norm(expected)
    print(f'{CASES[number]}: largest relative difference of a tensor {max(differences.values()):.1e}')  # pytest -rP
    assert {path: d for path, d in differences.items() if d >= 1e-6} == {}
