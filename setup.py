"""Builds the native engine: the same C source once for each instruction set, in one library.

Everything else about the package is in pyproject.toml. The engine is optional: without a C compiler the package
installs, and runs, without it.
"""

import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Floats in a vector, and what the compiler may use. dispatch.c asks the machine for exactly these.
BUILDS = {
    "avx512": (16, ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]),
    "avx2": (8, ["-mavx2", "-mfma"]),
    "generic": (4, []),
}
BUILDS["int8_vnni"] = (16, [*BUILDS["avx512"][1], "-mavx512vnni", "-mavx512vbmi", "-DINT8"])
BUILDS["int8_avx2"] = (8, [*BUILDS["avx2"][1], "-DINT8"])
# Sums may use fused multiply-adds; nothing here looks at errno or at floating-point exceptions.
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
    "-g0",
]


class BuildEngine(build_ext):
    """Compiles engine.c once per build, dispatch.c once, and links them."""

    def build_extension(self, ext: Extension) -> None:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        objects = self.compiler.compile([ext.sources[0]], output_dir=self.build_temp, extra_postargs=FLAGS)
        for name in BUILDS if x86 else ["generic"]:
            floats, flags = BUILDS[name]
            objects += self.compiler.compile(
                [ext.sources[1]],
                output_dir=f"{self.build_temp}/{name}",
                macros=[("BUILD", name), ("VL", str(floats))],
                extra_postargs=[*FLAGS, *flags],
            )
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name), extra_postargs=["-pthread"])


setup(
    ext_modules=[
        Extension(
            "rednet.model.native.library",
            ["src/rednet/model/native/dispatch.c", "src/rednet/model/native/engine.c"],
            optional=True,
            py_limited_api=True,  # it uses nothing of Python: one wheel serves all versions
        ),
    ],
    cmdclass={"build_ext": BuildEngine},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
