from mambakit.generate.prompt_graphs import sizes


def test_sizes_of_the_graphs() -> None:
    assert sizes(512) == [64, 128, 256, 512]
    assert sizes(513) == [64, 128, 256, 512, 513]
    assert sizes(65) == [64, 65]
    assert sizes(64) == [64]
    assert sizes(1) == [1]
