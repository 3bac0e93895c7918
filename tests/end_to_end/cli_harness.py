"""What the tests of the command share: a mistake ends in one line."""


def assert_refused(result, *words):
    """Exit code 2, nothing on stdout, and the words in the one line at the end of stderr."""
    code, stdout, stderr = result
    assert code == 2, stderr
    assert stdout == ''
    assert 'Traceback' not in stderr
    lines = stderr.splitlines()
    assert [line for line in lines if line.startswith('error: ')] == lines[-1:]
    for word in words:
        assert str(word) in lines[-1], lines[-1]
