# Each dependency is the system's package where there is one, else the archive named here. To take
# the archive all the same, configure with -DCMAKE_DISABLE_FIND_PACKAGE_<name>=ON; to take a folder,
# with -DFETCHCONTENT_SOURCE_DIR_<NAME>=<folder>.

include(cmake/find_or_download.cmake)

# What the searches leave in the cache is of no interest to a project around this one.
get_cmake_property(moe_cache_before CACHE_VARIABLES)

# A project around this one may have brought its own Eigen.
if(NOT TARGET Eigen3::Eigen)
  moe_find_or_download(Eigen3 HEADERS_ONLY LOWEST 3.4
    URL https://gitlab.com/libeigen/eigen/-/archive/3.4.0/eigen-3.4.0.tar.bz2
    SHA256 b4c198460eba6f28d34894e3a5710998818515104d6e74e5cc331ce31e46e626
    PACKAGES "libeigen3-dev (Debian, Ubuntu), eigen3-devel (Fedora), eigen (Homebrew), eigen3 (vcpkg)")
  moe_add_headers(Eigen3::Eigen "${eigen3_SOURCE_DIR}")
endif()

if(MOE_OPENMP)
  find_package(OpenMP COMPONENTS CXX)
endif()

# For moe::mpi, which is in C++ but needs no more than MPI's C functions. A compiler wrapper for
# this machine is of no use to a cross build.
if(MOE_MPI AND NOT CMAKE_CROSSCOMPILING)
  set(MPI_CXX_SKIP_MPICXX ON)
  find_package(MPI QUIET COMPONENTS CXX)
endif()

# For moe::io, and everything of ours that saves or loads.
if(NOT TARGET nlohmann_json::nlohmann_json)
  if(MOE_BUILD_TESTS OR MOE_BUILD_EXAMPLES)
    moe_find_or_download(nlohmann_json HEADERS_ONLY LOWEST 3.9
      URL https://github.com/nlohmann/json/releases/download/v3.11.3/json.tar.xz
      SHA256 d6c65aca6b1ed68e7a182f4757257b107ae403032760ed6ef121c9d55e81757d
      PACKAGES "nlohmann-json3-dev (Debian, Ubuntu), json-devel (Fedora), nlohmann-json (Homebrew)")
    moe_add_headers(nlohmann_json::nlohmann_json "${nlohmann_json_SOURCE_DIR}/include")
  else()
    find_package(nlohmann_json 3.9 CONFIG QUIET)
  endif()
endif()

if(NOT PROJECT_IS_TOP_LEVEL)
  get_cmake_property(moe_cache_after CACHE_VARIABLES)
  list(REMOVE_ITEM moe_cache_after ${moe_cache_before})
  if(moe_cache_after)  # else this is a second configuration
    mark_as_advanced(${moe_cache_after})
  endif()
endif()

if(MOE_BUILD_TESTS)
  # A cross build can use the system's Catch2 only where its header is all of it, as in version 2.
  set(catch2_version)
  if(CMAKE_CROSSCOMPILING)
    set(catch2_version 2.13)
  endif()
  moe_find_or_download(Catch2 LOWEST 2.13 FIND ${catch2_version}
    URL https://github.com/catchorg/Catch2/archive/refs/tags/v3.7.1.tar.gz
    SHA256 c991b247a1a0d7bb9c39aa35faf0fe9e19764213f28ffba3109388e62ee0269c
    PACKAGES "catch2 (Debian, Ubuntu, Homebrew), catch-devel (Fedora)")
  if(NOT TARGET Catch2::Catch2WithMain)
    message(FATAL_ERROR "The Catch2 in ${Catch2_DIR} was built without its main program. "
                        "Download another with -DCMAKE_DISABLE_FIND_PACKAGE_Catch2=ON.")
  endif()
  if(NOT Catch2_FOUND)
    set_target_properties(Catch2 Catch2WithMain PROPERTIES SYSTEM ON)
    list(APPEND CMAKE_MODULE_PATH "${catch2_SOURCE_DIR}/extras")
  endif()
endif()

if(MOE_BUILD_EXAMPLES)
  moe_find_or_download(CLI11 HEADERS_ONLY LOWEST 2.1
    URL https://github.com/CLIUtils/CLI11/archive/refs/tags/v2.4.2.tar.gz
    SHA256 f2d893a65c3b1324c50d4e682c0cdc021dd0477ae2c048544f39eed6654b699a
    PACKAGES "libcli11-dev (Debian, Ubuntu), cli11-devel (Fedora), cli11 (Homebrew)")
  moe_add_headers(CLI11::CLI11 "${cli11_SOURCE_DIR}/include")
endif()

if(MOE_BUILD_BENCHMARKS)
  set(BENCHMARK_ENABLE_TESTING OFF)
  set(BENCHMARK_ENABLE_INSTALL OFF)
  set(BENCHMARK_ENABLE_WERROR OFF)
  moe_find_or_download(benchmark LOWEST 1.7
    URL https://github.com/google/benchmark/archive/refs/tags/v1.9.1.tar.gz
    SHA256 32131c08ee31eeff2c8968d7e874f3cb648034377dfc32a4c377fa8796d84981
    PACKAGES "libbenchmark-dev (Debian, Ubuntu), google-benchmark-devel (Fedora), google-benchmark (Homebrew)")
  if(NOT benchmark_FOUND)
    set_target_properties(benchmark benchmark_main PROPERTIES SYSTEM ON)
  endif()
endif()
