"""Reads and writes the weights of GhostNet under the names of timm and of the authors' PyTorch code.

    python -m ghostnet.pytorch ghostnet_050.safetensors ghostnet.weights.h5 --width=0.5
    python -m ghostnet.pytorch ghostnet.keras ghostnet.npz

Nothing is unpickled: .pth and .pt, which need torch, go through torch.load(weights_only=True).
"""
import argparse
import itertools
import logging
import os
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import safetensors.numpy

from ghostnet.model import BLOCKS, ghostnet

# Of damaged files, besides OSError and ValueError.
_READ_ERRORS = (zipfile.BadZipFile, safetensors.SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError)

_PARAMETERS = {'kernel': 'weight', 'bias': 'bias', 'gamma': 'weight', 'beta': 'bias', 'moving_mean': 'running_mean',
               'moving_variance': 'running_var'}
_GHOST_MODULE = {'primary/conv': 'primary_conv.0', 'primary/bn': 'primary_conv.1',
                 'cheap/conv': 'cheap_operation.0', 'cheap/bn': 'cheap_operation.1'}
_BLOCK = {**{f'{ghost}/{ours}': f'{ghost}.{theirs}'
             for ghost in ('ghost1', 'ghost2') for ours, theirs in _GHOST_MODULE.items()},
          'depthwise/conv': 'conv_dw', 'depthwise/bn': 'bn_dw',
          'se/reduce': 'se.conv_reduce', 'se/expand': 'se.conv_expand',
          'shortcut_depthwise/conv': 'shortcut.0', 'shortcut_depthwise/bn': 'shortcut.1',
          'shortcut_pointwise/conv': 'shortcut.2', 'shortcut_pointwise/bn': 'shortcut.3'}
# PyTorch numbers the blocks by stage. A stage ends wherever the stride changes; the tail counts as one more.
_STAGES = [list(rows) for _, rows in itertools.groupby(BLOCKS, key=lambda row: row[-1])]
_BLOCK_NAMES = [f'blocks.{stage}.{index}' for stage, rows in enumerate(_STAGES) for index in range(len(rows))]
_MODULES = {'stem/conv': 'conv_stem', 'stem/bn': 'bn1',
            **{f'block_{number}/{ours}': f'{name}.{theirs}'
               for number, name in enumerate(_BLOCK_NAMES, start=1) for ours, theirs in _BLOCK.items()},
            'tail/conv': f'blocks.{len(_STAGES)}.0.conv', 'tail/bn': f'blocks.{len(_STAGES)}.0.bn1',
            'head/conv': 'conv_head', 'classifier': 'classifier'}


def load_pytorch_weights(model: keras.Model, path_or_mapping: str | os.PathLike | Mapping[str, Any], *,
                         strict: bool = True) -> dict[str, list[str]]:
    """Sets the variables of a GhostNet, class or function form, from a PyTorch state dict: name -> array or tensor.

    It may also be a .pth or .pt (which need torch), .safetensors or .npz file, or stand under 'state_dict' or 'model'.
    num_batches_tracked is ignored. Not strict loads what fits, and logs a warning that lists the rest.

    Returns {'missing': [...], 'left over': [...], 'misshapen': [...]}: what did not fit. Empty lists where strict.
    Raises ValueError for names or shapes that do not fit, all of them listed (strict; the model remains as it was), for
    a model that is no GhostNet, and for a file of another format; ImportError for a .pth or .pt file without torch.
    """
    is_mapping = isinstance(path_or_mapping, Mapping)
    state = path_or_mapping if is_mapping else _read(os.fspath(path_or_mapping))
    # 'module.' is DistributedDataParallel's prefix; a tensor may be on any device, and NumPy knows no bfloat16.
    state = {key.removeprefix('module.'):
             np.asarray(value.detach().cpu().float() if hasattr(value, 'detach') else value, np.float32)
             for key, value in state.get('state_dict', state.get('model', state)).items()
             if not key.endswith('num_batches_tracked')}
    variables = _variables_by_key(model)
    shapes = {key: tuple(variable.shape[i] for i in _axes(variable)) for key, variable in variables.items()}
    fitting = [key for key in variables if key in state and state[key].shape == shapes[key]]
    problems = {'missing': [key for key in variables if key not in state],
                'left over': [key for key in state if key not in variables],
                'misshapen': [f'{key} {state[key].shape} instead of {shapes[key]}' for key in variables
                              if key in state and key not in fitting]}
    if any(problems.values()):
        source = 'the state dict' if is_mapping else path_or_mapping
        message = f'{source} does not fit the model {model.name}: ' + '; '.join(
            f'{len(keys)} {problem}: {", ".join(keys)}' for problem, keys in problems.items() if keys)
        if strict:
            raise ValueError(message)
        logging.getLogger(__name__).warning('%s', message)
    for key in fitting:
        variables[key].assign(state[key].transpose(np.argsort(_axes(variables[key]))))
    return problems


def to_pytorch_state_dict(model: keras.Model, naming: str = 'timm') -> dict[str, np.ndarray]:
    """The weights of a GhostNet, class or function form, as float32 arrays under PyTorch's names and in its layout.

    As tensors they fit load_state_dict of timm's and of the authors' model. num_batches_tracked, which that does not
    ask of a plain dict, is left out. Raises ValueError for another naming, or a model that is no GhostNet.
    """
    if naming not in ('timm', 'official'):  # the same names for version 1
        raise ValueError(f'naming is {naming!r}; it must be one of timm, official')
    return {key: np.ascontiguousarray(variable.numpy().transpose(_axes(variable)))
            for key, variable in _variables_by_key(model).items()}


def _variables_by_key(model: keras.Model) -> dict[str, keras.Variable]:
    variables = {}
    for variable in model.weights:
        module, _, name = variable.path.removeprefix(f'{model.name}/').rpartition('/')
        if module not in _MODULES:
            raise ValueError(f'{variable.path} of the model {model.name} has no name in PyTorch; the model must come '
                             'from ghostnet.GhostNet or ghostnet.ghostnet')
        variables[f'{_MODULES[module]}.{_PARAMETERS[name]}'] = variable
    return variables


def _axes(variable: keras.Variable) -> tuple[int, ...]:
    """The order that PyTorch has the axes of a variable in."""
    if len(variable.shape) < 4:
        return tuple(reversed(range(len(variable.shape))))  # a dense kernel is [in, out] here and [out, in] there
    # Kernels are [k, k, in, out] here and [out, in, k, k] there; depthwise [k, k, C, 1] and [C, 1, k, k]. A 1 tells the
    # depthwise ones: no ordinary convolution of the network has one output.
    return (2, 3, 0, 1) if variable.shape[3] == 1 else (3, 2, 0, 1)


def _read(path: str) -> Mapping[str, Any]:
    if not path.endswith(('.npz', '.safetensors', '.pth', '.pt')):
        raise ValueError(f'{path} is no file of PyTorch weights: it must be .pth, .pt, .safetensors or .npz')
    try:
        if path.endswith('.npz'):
            with np.load(path, allow_pickle=False) as archive:
                return dict(archive)
        if path.endswith('.safetensors'):
            return safetensors.numpy.load_file(path)
        import torch
        return torch.load(path, map_location='cpu', weights_only=True)
    except ImportError as error:
        raise ImportError(f'{path} needs torch: install it, or give .safetensors or .npz') from error
    except (*_READ_ERRORS, AttributeError) as error:  # the latter of types that NumPy lacks
        raise ValueError(f'{path} is no intact file of weights: {str(error).partition(chr(10))[0]}') from error


def main(argv: list[str] | None = None) -> None:
    """Converts weights of GhostNet between PyTorch's formats and those of Keras."""
    parser = argparse.ArgumentParser(prog='python -m ghostnet.pytorch', description=main.__doc__)
    parser.add_argument('source', help='.pth, .pt, .safetensors, .npz; .keras or .weights.h5 of the function form')
    parser.add_argument('target', help='.npz of a PyTorch state dict; .keras or .weights.h5 of the function form')
    parser.add_argument('--width', type=float, default=1.0)
    parser.add_argument('--num_classes', type=int, default=1000)
    args = parser.parse_args(argv)
    if not args.target.endswith(('.npz', '.keras', '.weights.h5')):
        parser.error(f'target is {args.target}; it must be .npz, .keras or .weights.h5')
    try:
        if args.source.endswith('.keras'):
            model = keras.saving.load_model(args.source)
        else:
            model = ghostnet(args.num_classes, args.width, image_size=None)
            if args.source.endswith('.weights.h5'):
                model.load_weights(args.source)
            else:
                load_pytorch_weights(model, args.source)
        if args.target.endswith('.npz'):
            np.savez(args.target, **to_pytorch_state_dict(model))
        else:
            (model.save if args.target.endswith('.keras') else model.save_weights)(args.target)
    except (ValueError, TypeError, ImportError, OSError) as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
