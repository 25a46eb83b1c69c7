from os.path import join

from conan import ConanFile
from conan.tools.build import check_min_cppstd
from conan.tools.files import copy, get
from conan.tools.layout import basic_layout

required_conan_version = ">=2.0.9"


class MoeConan(ConanFile):
    name = "moe"
    description = "Sparse mixture-of-experts layers on Eigen, with hand-written backprop"
    license = "MIT"
    url = "https://github.com/conan-io/conan-center-index"
    homepage = "@homepage@"
    topics = ("machine-learning", "mixture-of-experts", "eigen", "header-only")
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"openmp": [True, False], "io": [True, False]}
    default_options = {"openmp": True, "io": True}
    no_copy_source = True

    def config_options(self):
        # Apple's compiler comes without OpenMP's library.
        if self.settings.compiler == "apple-clang":
            del self.options.openmp

    def layout(self):
        basic_layout(self, src_folder="src")

    def requirements(self):
        self.requires("eigen/3.4.0", transitive_headers=True)
        if self.options.io:
            self.requires("nlohmann_json/3.11.3", transitive_headers=True)

    def package_id(self):
        self.info.clear()

    def validate(self):
        check_min_cppstd(self, 20)

    def source(self):
        get(self, **self.conan_data["sources"][self.version], strip_root=True)

    def package(self):
        copy(self, "LICENSE", self.source_folder, join(self.package_folder, "licenses"))
        copy(self, "*.hpp", join(self.source_folder, "include"), join(self.package_folder, "include"))

    def package_info(self):
        self.cpp_info.set_property("cmake_file_name", "moe")
        # All components together. By default the target would be moe::moe, which is the layer's own.
        self.cpp_info.set_property("cmake_target_name", "moe::all")
        self.cpp_info.set_property("pkg_config_name", "moe-all")

        layer = self.cpp_info.components["layer"]
        layer.set_property("cmake_target_name", "moe::moe")
        layer.set_property("pkg_config_name", "moe")
        layer.bindirs = []
        layer.libdirs = []
        layer.requires = ["eigen::eigen"]
        if self.options.get_safe("openmp"):
            flag = "/openmp:llvm" if self.settings.compiler == "msvc" else "-fopenmp"
            layer.cxxflags = [flag]
            if self.settings.compiler != "msvc":
                layer.exelinkflags = [flag]
                layer.sharedlinkflags = [flag]

        if self.options.io:
            io = self.cpp_info.components["io"]
            io.set_property("cmake_target_name", "moe::io")
            io.bindirs = []
            io.libdirs = []
            io.requires = ["layer", "nlohmann_json::nlohmann_json"]
