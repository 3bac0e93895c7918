"""The layering and the size of the system, read from its source: imports go down only, and one person can read it all.

Nothing is imported here; each checker takes a root directory, so that the tests at the end can plant a violation.
"""

import ast
import importlib.metadata
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ('ghostnet', 'input_pipeline', 'trainer')
MAX_TOTAL_LINES = 5000
MAX_FILE_LINES = 350

# The modules of trainer/, highest first: a module imports only what stands in a lower line.
LEVELS = (
    {'__init__', 'main'},
    {'arrays'},
    {'loop', 'benchmark', 'check', 'export', 'compare', 'config'},
    {'evaluate', 'resume', 'saver'},
    {'step'},
    {'gradient', 'update', 'bad_examples'},
    {'state', 'optimizer', 'checkpoint', 'telemetry', 'preemption', 'goodput', 'stalls', 'plan'},
    {'strategy'},
    {'schedule', 'loss', 'loss_scale', 'guard', 'metrics', 'mix', 'ema', 'distill'},
    {'recipe', 'exits'},
)
THIRD_PARTY = {
    'ghostnet': {'keras', 'numpy', 'safetensors', 'tensorflow'},
    # array_record is the reader of one of TFDS' own two file formats. google: protobuf, for its DecodeError. Images are
    # decoded, resized and changed by simplejpeg, OpenCV and Pillow: TensorFlow's operations take half as long again.
    'input_pipeline': {'PIL', 'array_record', 'cv2', 'google', 'google_crc32c', 'numpy', 'simplejpeg', 'tensorflow',
                       'tensorflow_datasets'},
}
# Only for those who read such a file, and only there.
OPTIONAL = {'ghostnet/pytorch.py': {'torch'}}
ONLY_IN_STEP = ('all_reduce', 'jit_compile')


def sources(root: pathlib.Path) -> dict[str, ast.Module]:
    """The syntax trees of the three packages by path from the root."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob('*.py'))]
    return {path.relative_to(root).as_posix(): ast.parse(path.read_text(), path) for path in paths}


def imports(tree: ast.Module) -> set[str]:
    """Every dotted name that a module imports anywhere: `from a import b` is a.b, a relative one begins with a dot."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f'{"." * node.level}{node.module or ""}.{alias.name}' for alias in node.names}
    return names


def level(module: str) -> int:
    """The line of LEVELS that holds a module of trainer/; whatever is no module is a name of the package itself."""
    return next((i for i, modules in enumerate(LEVELS) if module in modules), 0)


def layering_violations(root: pathlib.Path) -> list[str]:
    found = []
    for path, tree in sources(root).items():
        package, stem = path.split('/')[0], pathlib.PurePath(path).stem
        for name in sorted(imports(tree)):
            target = name.split('.')[0]
            if not target:
                found.append(f'{path} imports {name}: write the absolute name')
            elif target == 'gin' and path != 'trainer/config.py':
                found.append(f'{path} imports gin: only trainer/config.py may')
            elif target in PACKAGES and target != package and package != 'trainer':
                found.append(f'{path} imports {target}: {package} stands alone')
            elif target in PACKAGES or target in sys.stdlib_module_names:
                continue
            elif target not in THIRD_PARTY.get(package, {target}) | OPTIONAL.get(path, set()):
                found.append(f'{path} imports {target}: {package} knows only {", ".join(sorted(THIRD_PARTY[package]))}')
        if package == 'trainer':
            if not any(stem in modules for modules in LEVELS):
                found.append(f'{path} has no place in LEVELS: say where it stands')
            own = [name for name in sorted(imports(tree)) if name.split('.')[0] == 'trainer']
            upward = [name for name in own if level((name + '.__init__').split('.')[1]) <= level(stem)]
            found += [f'{path} imports {name}: imports go down only' for name in upward]
    return found


def replica_violations(root: pathlib.Path) -> list[str]:
    """Places outside trainer/step.py that know of replicas or of the compiler."""
    found = []
    for path, tree in sources(root).items():
        for node in ast.walk(tree):
            words = {getattr(node, field, None) for field in ('id', 'attr', 'arg')} & set(ONLY_IN_STEP)
            if isinstance(node, ast.Attribute) and node.attr == 'run' and 'strategy' in ast.unparse(node.value).lower():
                words.add('strategy.run')
            if path != 'trainer/step.py':
                found += [f'{path}:{node.lineno} has {word}: only trainer/step.py may' for word in sorted(words)]
    return found


def untyped_functions(root: pathlib.Path) -> list[str]:
    """Public functions of modules that leave an argument or the result without a type."""
    found = []
    for path, tree in sources(root).items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                missing = [argument.arg for argument in arguments if argument.annotation is None]
                missing += ['its result'] if node.returns is None else []
                found += [f'{path}:{node.lineno} {node.name}: no type for {", ".join(missing)}'] if missing else []
    return found


def num_lines(root: pathlib.Path) -> dict[str, int]:
    return {path: len((root / path).read_text().splitlines()) for path in sources(root)}


def setup_argument(name: str) -> object:
    """A keyword of the setup() call, read without running it."""
    tree = ast.parse((ROOT / 'setup.py').read_text())
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == 'setup')
    return next(ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == name)


def test_imports_go_down_only():
    assert sources(ROOT).keys() >= {'ghostnet/model.py', 'input_pipeline/dataset.py', 'trainer/main.py'}
    assert layering_violations(ROOT) == []


def test_only_the_step_knows_of_replicas_and_of_the_compiler():
    assert replica_violations(ROOT) == []


def test_public_functions_have_types():
    assert untyped_functions(ROOT) == []


def test_the_system_can_be_read_in_one_afternoon():
    lines = num_lines(ROOT)
    assert sum(lines.values()) < MAX_TOTAL_LINES
    assert {path: n for path, n in lines.items() if n > MAX_FILE_LINES} == {}


def test_no_file_collects_odds_and_ends():
    assert [path for path in sources(ROOT) if pathlib.PurePath(path).stem in ('util', 'utils', 'helpers', 'misc')] == []


def test_gin_stays_a_directory_of_recipes():
    assert (ROOT / 'gin').is_dir()
    assert list((ROOT / 'gin').rglob('*.py')) == [], 'gin/__init__.py would hide the package gin-config'


def test_setup_lists_the_packages_that_exist():
    tops = [path.parent for path in ROOT.glob('*/__init__.py')]
    inits = [path for top in tops for path in top.rglob('__init__.py')]
    assert sorted(setup_argument('packages')) == sorted('.'.join(path.parent.relative_to(ROOT).parts) for path in inits)


def test_setup_requires_what_the_packages_import():
    extras = setup_argument('extras_require')
    requirements = setup_argument('install_requires') + [name for extra in extras.values() for name in extra]
    required = {re.match(r'[\w-]+', name)[0].replace('_', '-').lower() for name in requirements}
    imported = {name.split('.')[0] for tree in sources(ROOT).values() for name in imports(tree)}
    distributions = importlib.metadata.packages_distributions()
    missing = {
        name: distributions.get(name)
        for name in imported - set(PACKAGES) - sys.stdlib_module_names
        if not {dist.replace('_', '-').lower() for dist in distributions.get(name, [name])} & required
    }
    assert missing == {}


@pytest.fixture
def plant(tmp_path):
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ('path', 'text'),
    [
        ('ghostnet/layers.py', 'import trainer'),
        ('ghostnet/layers.py', 'from input_pipeline import order'),
        ('ghostnet/layers.py', 'import tensorflow_datasets as tfds'),
        ('ghostnet/layers.py', 'def f():\n    import torch'),
        ('input_pipeline/sources/tfds.py', 'from ghostnet.layers import ConvBN'),
        ('input_pipeline/dataset.py', 'import keras'),
        ('input_pipeline/dataset.py', 'from . import order'),
        ('trainer/loop.py', 'import gin'),
        ('trainer/main.py', 'from gin import config'),
        ('trainer/loop.py', 'from trainer import config'),
        ('trainer/loop.py', 'import trainer.main'),
        ('trainer/step.py', 'from trainer.evaluate import make_evaluate'),
        ('trainer/state.py', 'from trainer.checkpoint import save'),
        ('trainer/loss.py', 'def f():\n    from trainer.state import TrainState'),
        ('trainer/recipe.py', 'from trainer import train'),
        ('trainer/odds_and_ends.py', 'import math'),
    ],
)
def test_the_layering_check_sees(plant, path, text):
    violations = layering_violations(plant(path, text))
    assert len(violations) == 1
    assert violations[0].startswith(path)


@pytest.mark.parametrize(
    ('path', 'text'),
    [
        ('ghostnet/layers.py', 'import math, keras, numpy as np\nfrom ghostnet import keyed'),
        ('input_pipeline/sources/tfds.py', 'import tensorflow_datasets as tfds\nfrom input_pipeline import order'),
        ('trainer/config.py', 'import gin\nfrom trainer import recipe, strategy\nimport ghostnet, input_pipeline'),
        ('trainer/main.py', 'from absl import flags\nfrom trainer import config, loop'),
        ('trainer/evaluate.py', 'from trainer.step import distribute'),
    ],
)
def test_the_layering_check_allows(plant, path, text):
    assert layering_violations(plant(path, text)) == []


@pytest.mark.parametrize(
    ('text', 'word'),
    [
        ('strategy.run(f)', 'strategy.run'),
        ('tf.distribute.get_strategy().run(f)', 'strategy.run'),
        ('context.all_reduce("SUM", x)', 'all_reduce'),
        ('tf.function(f, jit_compile=True)', 'jit_compile'),
    ],
)
def test_the_replica_check_sees(plant, text, word):
    assert replica_violations(plant('trainer/step.py', text)) == []
    assert [word in violation for violation in replica_violations(plant('trainer/loop.py', text))] == [True]


def test_the_type_check_sees(plant):
    functions = 'def f(x) -> int: ...', 'def g(x: int): ...', 'def _h(x): ...', 'def k(x: int) -> int: ...'
    root = plant('ghostnet/model.py', '\n'.join(functions))
    assert [violation.split()[1] for violation in untyped_functions(root)] == ['f:', 'g:']


def test_lines_are_counted(plant):
    assert num_lines(plant('ghostnet/model.py', '1\n\n# c\n')) == {'ghostnet/model.py': 3}
