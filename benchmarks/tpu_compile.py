"""What the TPU compiler says of the training step, on a machine that has no TPU: nothing is run.

    pip install -e '.[tpu-check]' && python benchmarks/tpu_compile.py

Compiles the step of trainer/step.py, GhostNet 1.0 with momentum SGD, for one chip of a slice, with the all-reduce over
its replicas. The compiler is libtpu's, reached through interfaces of jax that are not public: hence the pins in
setup.py. Prints one JSON object; the numbers are the compiler's own estimates and do not vary from run to run.
"""
import argparse
import json
import os
import re
import time

# Before TensorFlow and jax are imported: libtpu must not look for a machine around it.
os.environ.update(TPU_SKIP_MDS_QUERY='1', JAX_PLATFORMS='cpu', TPU_ACCELERATOR_TYPE='v5litepod-4',
                  TPU_WORKER_HOSTNAMES='localhost', TPU_WORKER_ID='0', TF_CPP_MIN_LOG_LEVEL='3')

import keras
import numpy as np
import tensorflow as tf
from jax._src.interpreters import mlir as jax_mlir
from jax.experimental import topologies
from jaxlib import _jax, xla_client
from jaxlib.mlir import ir
from tensorflow.compiler.tf2xla.ops.gen_xla_ops import xla_all_reduce  # no public name for it

from ghostnet import ghostnet
from trainer import optimizer, schedule
from trainer.recipe import Train
from trainer.state import build_train_state
from trainer.step import make_normalize, make_step

HOST_TRANSFERS = re.compile(r'\b(?:infeed|outfeed|send|recv|host-compute)(?:-start|-done)?\(')


def lower_step(rows: int, num_replicas: int, image_size: int, width: float, precision: str) -> bytes:
    """The unoptimised HLO of what one replica computes with `rows` rows."""
    keras.config.set_dtype_policy(precision)
    model = ghostnet(1000, width, image_size=None)
    init, update = optimizer.sgd(momentum=0.9, weight_decay=4e-5)
    settings = Train(epochs=1, global_batch_size=rows * num_replicas, label_smoothing=0.1, model=lambda: model,
                     optimizer=optimizer.sgd, schedule=schedule.cosine)
    values = build_train_state(model, init, settings).read()
    step = make_step(
        model, settings, normalize=make_normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), update_fn=update,
        schedule=schedule.cosine(0.8, num_steps=100_000), num_replicas=num_replicas,
        all_reduce=lambda tensor: xla_all_reduce(tensor, [list(range(num_replicas))], 'Add', 'CrossReplica'))
    batch = {'image': tf.zeros([rows, image_size, image_size, 3], tf.uint8), 'label': tf.zeros([rows], tf.int32),
             'index': tf.zeros([rows], tf.int64), 'mask': tf.ones([rows])}
    step = tf.function(step, jit_compile=True, autograph=False)
    return step.experimental_get_compiler_ir(values, batch, tf.constant(0, tf.int64), tf.constant(0))(
        stage='hlo_serialized')


def compile_for_tpu(hlo: bytes, num_replicas: int, topology: str):
    """The executable of `hlo` for the first `num_replicas` chips of a topology, as 'v5e:2x2'."""
    with jax_mlir.make_ir_context():
        module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(hlo))
        copies = []  # not legal in StableHLO, and here always identities

        def collect(op):
            if op.name == 'mhlo.copy':
                copies.append(op)
            return ir.WalkResult.ADVANCE

        module.operation.walk(collect)
        for op in copies:
            op.results[0].replace_all_uses_with(op.operands[0])
            op.erase()
        devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[:num_replicas]
        options = xla_client.CompileOptions()
        options.num_replicas = num_replicas
        options.device_assignment = xla_client.DeviceAssignment.create(np.array([[device.id] for device in devices]))
        return devices[0].client.compile(module, xla_client.DeviceList(tuple(devices)), options)


def main() -> None:
    """Reads the flags, compiles, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=256, help='rows of a replica')
    parser.add_argument('--num_replicas', type=int, default=4)
    parser.add_argument('--image_size', type=int, default=224)
    parser.add_argument('--width', type=float, default=1.0)
    parser.add_argument('--precision', default='mixed_bfloat16')
    parser.add_argument('--topology', default='v5e:2x2')
    flags = parser.parse_args()
    start = time.perf_counter()
    hlo = lower_step(flags.rows, flags.num_replicas, flags.image_size, flags.width, flags.precision)
    lowered = time.perf_counter()
    compiled = compile_for_tpu(hlo, flags.num_replicas, flags.topology)
    memory, cost = compiled.get_compiled_memory_stats(), compiled.cost_analysis()
    text = compiled.hlo_modules()[0].to_string()
    resident = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(json.dumps(vars(flags) | {
        'memory_gb': round((resident + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes) / 1e9, 2),
        'temporaries_gb': round(memory.temp_size_in_bytes / 1e9, 2), 'gflop': round(cost['flops'] / 1e9, 1),
        'mb_moved_an_image': round(cost['bytes accessed'] / flags.rows / 1e6, 1),
        'all_reduces': len(re.findall(r' all-reduce(?:-start)?\(', text)),
        'host_transfers': len(HOST_TRANSFERS.findall(text)), 'fusions': text.count(' fusion('),
        'secs_to_lower': round(lowered - start, 1), 'secs_to_compile': round(time.perf_counter() - lowered, 1)}))


if __name__ == '__main__':
    main()
