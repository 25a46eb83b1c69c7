from conan import ConanFile


class SystemConan(ConanFile):
    """Eigen or nlohmann-json as the system has it, for packaging/test.sh."""

    package_type = "header-library"

    def package_info(self):
        self.cpp_info.bindirs = []
        self.cpp_info.libdirs = []
        self.cpp_info.includedirs = ["/usr/include"]
        if self.name == "eigen":
            self.cpp_info.includedirs = ["/usr/include/eigen3"]
            self.cpp_info.set_property("cmake_file_name", "Eigen3")
            self.cpp_info.set_property("cmake_target_name", "Eigen3::Eigen")
