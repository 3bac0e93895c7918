"""All of gin: what can be bound, from which files, and whether every binding is used.

The only module that imports gin: the library works without it. Turns gin's own errors into one line.
"""
import dataclasses
import difflib
import functools
import inspect
import logging
import re
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gin
import keras

import input_pipeline
from ghostnet import article, ghostnet
from trainer import optimizer, recipe, schedule, strategy
from trainer.recipe import ConfigError

if not hasattr(gin, 'external_configurable'):
    raise ConfigError('the package gin-config is not installed, or a folder named gin hides it: run pip install -e . '
                      'in the repository, and see that gin/ has no __init__.py')

REPOSITORY = Path(__file__).resolve().parent.parent
gin.add_config_file_search_path(str(REPOSITORY))


def build_ghostnet(num_classes: int = 1000, width: float = 1.0, version: int = 1,
                   dropout: float | None = None) -> keras.Model:
    """`ghostnet.*`: for images of any size, which comes from the data."""
    return ghostnet(num_classes, width, version, image_size=None, dropout=dropout)


def build_article_ghostnet(num_classes: int = 1000, apply_se: bool = True) -> keras.Model:
    """`article_ghostnet.*`: the tutorial's variant, giving logits as the loss wants them."""
    return article.GhostNet(num_classes, apply_se, classifier_activation=None)


_ROOTS = {'train': recipe.Train, 'data': recipe.Data, 'evaluate': recipe.Evaluate,
          'build_strategy': strategy.build_strategy, 'train_dataset': input_pipeline.train_dataset,
          'eval_dataset': input_pipeline.eval_dataset}
_PARTS = {'ghostnet': build_ghostnet, 'article_ghostnet': build_article_ghostnet, 'sgd': optimizer.sgd,
          'rmsprop': optimizer.rmsprop, 'adamw': optimizer.adamw, 'lamb': optimizer.lamb, 'cosine': schedule.cosine,
          'linear': schedule.linear, 'exponential': schedule.exponential, 'constant_rate': schedule.constant_rate,
          'random_resized_crop': input_pipeline.make_random_resized_crop,
          'random_shift': input_pipeline.make_random_shift, 'rand_augment': input_pipeline.make_rand_augment,
          'auto_augment': input_pipeline.make_auto_augment, 'color_jitter': input_pipeline.make_color_jitter}
# What a run gives to its roots itself: not for gin to bind.
_GIVEN = {'eval_dataset': (_of_both := ['source', 'global_batch_size', 'shard', 'num_shards', 'on_bad']),
          'train_dataset': [*_of_both, 'seed', 'start_position', 'on_times'],
          **dict.fromkeys(['cosine', 'linear', 'exponential', 'constant_rate'],
                          ['num_steps', 'steps_per_epoch', 'global_batch_size'])}
_CONFIGURABLES = {name: gin.external_configurable(target, name, denylist=_GIVEN.get(name))
                  for name, target in (_ROOTS | _PARTS).items()}

_BINDINGS = gin.config._CONFIG  # {(scope, selector): {parameter: value}}, what the files say; gin clears it in place
_MACRO = 'gin.macro'


class Config(NamedTuple):
    """What a run is made of."""

    train: recipe.Train
    data: recipe.Data
    evaluate: recipe.Evaluate
    build_strategy: Callable[[], Any]
    train_dataset: Callable[..., Any]  # input_pipeline.train_dataset with what gin binds
    eval_dataset: Callable[..., Any]
    fingerprint: dict[str, str]  # {'train.seed': '0', ...}, defaults included: what a resume must match
    text: str  # all bindings

    def write(self, workdir: Path) -> None:
        """Writes what was bound, config.gin, and taken, operative_config.gin. Raises ConfigError if it cannot."""
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            for name, text in (('config.gin', self.text), ('operative_config.gin', gin.operative_config_str())):
                if not (path := workdir / name).exists() or path.read_text() != text:  # or a full disk would empty it
                    path.write_text(text)
        except OSError as error:
            raise ConfigError(f'--workdir {workdir} cannot be written: {error}') from error


def load(files: Sequence[str], params: Sequence[str]) -> Config:
    """Parses gin/defaults.gin, then `files` from left to right, then `params`, and checks every binding.

    Relative paths are looked up in the current directory, then in the repository; params are as 'ghostnet.width=0.5'.
    Raises ConfigError: no such file, wrong syntax, an unknown name, a binding that nothing uses, a wrong or no value.
    """
    gin.clear_config()
    for file in [str(REPOSITORY / 'gin/defaults.gin'), *files]:
        found = [str(path) for path in (Path(file), REPOSITORY / file) if path.is_file()]
        if not found:
            raise ConfigError(f'no file {file}: relative paths are looked up in the current directory and {REPOSITORY}')
        _parse(gin.parse_config_file, found[0], file)
    for param in params:
        _parse(gin.parse_config, param, f"--gin_param='{param}'")
    fingerprint = _fingerprint(_used_selectors())
    roots = {name: functools.partial(_call, _CONFIGURABLES[name]) for name in _ROOTS}
    settings = {name: roots.pop(name)() for name in ('train', 'data', 'evaluate')}
    wrapped = {k: functools.partial(_call, getattr(settings['train'], k)) for k in ('model', 'optimizer', 'schedule')}
    settings['train'] = dataclasses.replace(settings['train'], **wrapped)
    return Config(**settings, **roots, fingerprint=fingerprint, text=gin.config_str())


def _parse(parse: Callable[[str], Any], argument: str, origin: str) -> None:
    logging.disable(logging.ERROR)  # gin logs each place that does not have a file that another one has
    try:
        parse(argument)
    except tokenize.TokenError as error:
        problem, (line, _) = error.args
        raise ConfigError(f'{origin}: line {line}: {problem}: a bracket or a quote is not closed') from None
    except SyntaxError as error:
        problem = re.sub(r".*Failed to parse token '(.*)'.*", r'\1 is no value', error.msg.rstrip('.'), flags=re.DOTALL)
        raise ConfigError(f'{error.filename or origin}: line {error.lineno}: {problem}; a binding is '
                          'name.parameter = value, strings in quotes') from None
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError, OSError) as error:
        # gin adds the place to most of its messages; in a --gin_param it is always line 1.
        place = re.search(r'\n  In file "(.*)", line (\d+)', str(error))
        origin = f'{place[1]}: line {place[2]}' if place else origin
        problem = str(error).strip().partition('\n')[0].rstrip('.')
        raise ConfigError(f'{origin}: {problem}{_suggestion(str(error))}') from None
    finally:
        logging.disable(logging.NOTSET)


def _suggestion(message: str) -> str:
    """The nearest of the names that exist, for gin's messages on unknown ones."""
    if unknown := re.search(r"'(\S+)' doesn't have a parameter named '(\S+)'", message):
        owner, name = unknown[1].rsplit('.', 1)[-1], unknown[2]
        known, prefix = [parameter.name for parameter in _parameters(owner)], f'{owner}.'
    elif unknown := re.search(r"No configurable matching (?:reference )?'@?([^'(]+)", message):
        name, known, prefix = unknown[1].rsplit('/', 1)[-1], list(_ROOTS | _PARTS), ''
    else:
        return '; the run gives it' if 'denylisted' in message else ''
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f'; did you mean {prefix}{near[0]}?' if near else f'; there are {", ".join(prefix + k for k in known)}'


def _used_selectors() -> list[tuple[str, str]]:
    """(scope, selector) of the roots and of all that is referenced from them; refuses a binding of anything else."""
    reached = [('', gin.config._REGISTRY.get_match(name).selector) for name in _ROOTS]
    for key in reached:  # grows while it is walked
        for reference in gin.config.iterate_references(_BINDINGS.get(key, {})):
            scope, selector = reference.config_key
            parts = scope.split('/') if scope else []  # a scope falls back on outer ones
            keys = [('/'.join(parts[:i]), selector) for i in range(len(parts), -1, -1)]
            reached.extend(k for k in keys if k not in reached)
    for scope, selector in (key for key in _BINDINGS if key not in reached):
        if selector == _MACRO:
            raise ConfigError(f'the macro {scope} is set, but nothing uses it: take it out, or write %{scope} where it '
                              'belongs')
        name = '/'.join(filter(None, [scope, selector.rsplit('.', 1)[-1]]))
        raise ConfigError(f'{name}.{next(iter(_BINDINGS[scope, selector]))} is bound, but nothing uses {name}: take '
                          f'the binding out, or refer to @{name} where it belongs')
    return reached


def _parameters(name: str) -> list[inspect.Parameter]:
    """What gin may bind of a root or a part; of anything else nothing."""
    target = (_ROOTS | _PARTS).get(name)
    parameters = inspect.signature(target).parameters.values() if target else ()
    return [p for p in parameters if p.name not in _GIVEN.get(name, ())]


def _fingerprint(used: list[tuple[str, str]]) -> dict[str, str]:
    """Refuses what has no default and no binding; that of a root is called for first."""
    values = {}
    for scope, selector in used:
        name = selector.rsplit('.', 1)[-1]
        for parameter in _parameters(name):  # of a macro none: its value stands where it is used
            value = _BINDINGS.get((scope, selector), {}).get(parameter.name, parameter.default)
            key = '/'.join(filter(None, [scope, f'{name}.{parameter.name}']))
            if value is not parameter.empty:
                values[key] = _spelled(value)
            elif not any(parameter.name in bindings for (_, s), bindings in _BINDINGS.items() if s == selector):
                raise ConfigError(f'{name}.{parameter.name} has no value: name a recipe with --gin_file, as '
                                  f"gin/imagenet.gin, or bind it with --gin_param='{name}.{parameter.name}=...'")
    return {key: value for key, value in values.items() if not recipe.NOT_IN_FINGERPRINT.fullmatch(key)}


def _spelled(value: Any) -> str:
    if isinstance(value, gin.config.ConfigurableReference) and value.config_key[1] == _MACRO:
        if value.config_key not in _BINDINGS:
            macro = value.config_key[0]
            raise ConfigError(f'%{macro} is used, but no macro {macro} is set: write {macro} = value in the file')
        return _spelled(_BINDINGS[value.config_key]['value'])
    if isinstance(value, tuple | list):
        return f'({", ".join(map(_spelled, value))})'
    return getattr(value, '__name__', None) or repr(value)


def _call(configurable: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls it, but its errors become a ConfigError of one line; gin adds lines to every message."""
    try:
        return configurable(*args, **kwargs)
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(str(error).strip().partition('\n')[0]) from error
