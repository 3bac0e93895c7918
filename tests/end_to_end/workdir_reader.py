"""What a run has left in its workdir, for the tests that compare runs."""

import json

import tensorflow as tf

# What no two runs have in common.
CLOCK = ('time', 'train/images_per_sec', 'train/data_wait_fraction', 'train/worst_data_wait', 'train/input_',
         'train/secs_', 'train/goodput')


def tensors(workdir, step=None):
    """All tensors of the checkpoint of that step, or of the last one, read by TensorFlow alone."""
    reader = tf.train.load_checkpoint(str(workdir / 'checkpoints' / ('' if step is None else f'ckpt-{step:08d}/state')))
    return {name: reader.get_tensor(name) for name in sorted(reader.get_variable_to_shape_map())}


def assert_equal_bits(workdir, other):
    """Of every tensor of their last checkpoints."""
    a, b = tensors(workdir), tensors(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


def reports(workdir):
    """The lines of metrics.jsonl but for what the clock puts there."""
    return [{tag: value for tag, value in json.loads(line).items() if not tag.startswith(CLOCK)}
            for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
