"""Maps the folders at the repository root into one import package; metadata is in pyproject.toml."""

from setuptools import Extension, find_namespace_packages, find_packages, setup

NAME = "forebay"
#: Package to folder. The client is a frontend by its place in the code, and a package of its own to its users.
TREES = {"engine": "engine", "frontend": "frontend", "client": "frontend/client", "ipc": "ipc", "conf": "conf"}
#: What stands in forebay itself.
PACKAGE = "engine/package"
#: Folders inside the trees that are packages elsewhere.
APART = ["client*", "package"]

#: What a package ships besides its modules: type markers, settings, protocol descriptors, the dashboard's pages.
DATA = ["py.typed"] + [
    f"**/*.{suffix}" for suffix in ("toml", "binpb", "proto", "html", "css", "js", "svg", "json", "pyi")
]

#: Modules in C, and their sources.
COMPILED = {
    "engine.worker.rows_lane": "engine/worker/rows_lane.c",
    "client.glance_loop": "frontend/client/glance_loop.c",
}
#: For Python 3.11 and later. Without a C compiler they are left out, and Python does their work.
EXTENSIONS = [
    Extension(
        f"{NAME}.{module}",
        [source],
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        extra_compile_args=["-O2", "-std=c11", "-Wall", "-Wextra"],
        py_limited_api=True,
        optional=True,
    )
    for module, source in COMPILED.items()
]

#: Folders of data only, by tree. Without a module in them they are namespaces, which setuptools wants to see listed.
DATA_FOLDERS = {"client": ["c"], "conf": ["models", "models.*"]}


def data_packages(tree: str) -> list[str]:
    """Return the data folders of a tree whose names could be imported; others (versions: ``1``) are files of these."""
    folders = find_namespace_packages(TREES[tree], include=DATA_FOLDERS[tree])
    return [f"{NAME}.{tree}.{name}" for name in folders if all(part.isidentifier() for part in name.split("."))]


setup(
    # engine/x.py is forebay.engine.x in a checkout and in a wheel alike, and no module called plain "engine" or
    # "ipc" is ever installed.
    package_dir={NAME: PACKAGE} | {f"{NAME}.{tree}": folder for tree, folder in TREES.items()},
    packages=[NAME]
    + [
        name
        for tree, folder in TREES.items()
        for name in (f"{NAME}.{tree}", *(f"{NAME}.{tree}.{sub}" for sub in find_packages(folder, exclude=APART)))
    ]
    + [package for tree in DATA_FOLDERS for package in data_packages(tree)],
    # The example model repository travels inside the wheel: `forebay demo` needs no checkout.
    package_data={f"{NAME}.{tree}": DATA for tree in TREES}
    | {f"{NAME}.conf": [*DATA, "models/**/*"], f"{NAME}.client": [*DATA, "c/*.[ch]", "c/Makefile"]},
    ext_modules=EXTENSIONS,
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    exclude_package_data={"": ["*.py[co]", "**/__pycache__/*"]},
)
