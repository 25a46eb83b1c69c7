# Each dependency is the system's package where there is one, else the archive named here. To take
# the archive all the same, configure with -DCMAKE_DISABLE_FIND_PACKAGE_<name>=ON; to take a folder,
# with -DFETCHCONTENT_SOURCE_DIR_<NAME>=<folder>.
#
# No version is asked for in the search itself, since the version files of Eigen and Catch2 refuse
# every other major version, and newer ones are welcome. The lowest that will do is checked after.

include(FetchContent)

function(moe_check_version package lowest)
  if(${package}_FOUND AND "${${package}_VERSION}" VERSION_LESS lowest)
    message(FATAL_ERROR
      "moe needs ${package} ${lowest} or newer, but ${${package}_DIR} is ${${package}_VERSION}. "
      "Install a newer one, or fetch it with -DCMAKE_DISABLE_FIND_PACKAGE_${package}=ON.")
  endif()
endfunction()

# A library of headers needs no build of its own: SOURCE_SUBDIR names a folder that doesn't exist,
# so the archive is unpacked, and its CMakeLists.txt with all its options and targets left alone.
function(moe_add_headers target folder)
  if(NOT TARGET ${target})
    add_library(${target} INTERFACE IMPORTED GLOBAL)
    set_target_properties(${target} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${folder}")
  endif()
endfunction()

# A project around this one may have brought its own Eigen.
if(NOT TARGET Eigen3::Eigen)
  FetchContent_Declare(Eigen3
    URL https://gitlab.com/libeigen/eigen/-/archive/3.4.0/eigen-3.4.0.tar.bz2
    URL_HASH SHA256=b4c198460eba6f28d34894e3a5710998818515104d6e74e5cc331ce31e46e626
    SOURCE_SUBDIR headers-only
    FIND_PACKAGE_ARGS CONFIG)
  FetchContent_MakeAvailable(Eigen3)
  moe_check_version(Eigen3 3.4)
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
    FetchContent_Declare(nlohmann_json
      URL https://github.com/nlohmann/json/releases/download/v3.11.3/json.tar.xz
      URL_HASH SHA256=d6c65aca6b1ed68e7a182f4757257b107ae403032760ed6ef121c9d55e81757d
      SOURCE_SUBDIR headers-only
      FIND_PACKAGE_ARGS CONFIG)
    FetchContent_MakeAvailable(nlohmann_json)
    moe_check_version(nlohmann_json 3.9)
    moe_add_headers(nlohmann_json::nlohmann_json "${nlohmann_json_SOURCE_DIR}/include")
  else()
    find_package(nlohmann_json 3.9 CONFIG QUIET)
  endif()
endif()

if(MOE_BUILD_TESTS)
  # A cross build can use the system's Catch2 only where its header is all of it, as in version 2.
  set(catch2_version)
  if(CMAKE_CROSSCOMPILING)
    set(catch2_version 2.13)
  endif()
  FetchContent_Declare(Catch2
    URL https://github.com/catchorg/Catch2/archive/refs/tags/v3.7.1.tar.gz
    URL_HASH SHA256=c991b247a1a0d7bb9c39aa35faf0fe9e19764213f28ffba3109388e62ee0269c
    FIND_PACKAGE_ARGS ${catch2_version} CONFIG)
  FetchContent_MakeAvailable(Catch2)
  moe_check_version(Catch2 2.13)
  if(NOT TARGET Catch2::Catch2WithMain)
    message(FATAL_ERROR "The Catch2 in ${Catch2_DIR} was built without its main program. "
                        "Fetch another with -DCMAKE_DISABLE_FIND_PACKAGE_Catch2=ON.")
  endif()
  if(NOT Catch2_FOUND)
    set_target_properties(Catch2 Catch2WithMain PROPERTIES SYSTEM ON)
    list(APPEND CMAKE_MODULE_PATH "${catch2_SOURCE_DIR}/extras")
  endif()
endif()

if(MOE_BUILD_EXAMPLES)
  FetchContent_Declare(CLI11
    URL https://github.com/CLIUtils/CLI11/archive/refs/tags/v2.4.2.tar.gz
    URL_HASH SHA256=f2d893a65c3b1324c50d4e682c0cdc021dd0477ae2c048544f39eed6654b699a
    SOURCE_SUBDIR headers-only
    FIND_PACKAGE_ARGS CONFIG)
  FetchContent_MakeAvailable(CLI11)
  moe_check_version(CLI11 2.1)
  moe_add_headers(CLI11::CLI11 "${cli11_SOURCE_DIR}/include")
endif()

if(MOE_BUILD_BENCHMARKS)
  FetchContent_Declare(benchmark
    URL https://github.com/google/benchmark/archive/refs/tags/v1.9.1.tar.gz
    URL_HASH SHA256=32131c08ee31eeff2c8968d7e874f3cb648034377dfc32a4c377fa8796d84981
    FIND_PACKAGE_ARGS CONFIG)
  set(BENCHMARK_ENABLE_TESTING OFF)
  set(BENCHMARK_ENABLE_INSTALL OFF)
  set(BENCHMARK_ENABLE_WERROR OFF)
  FetchContent_MakeAvailable(benchmark)
  moe_check_version(benchmark 1.7)
  if(NOT benchmark_FOUND)
    set_target_properties(benchmark benchmark_main PROPERTIES SYSTEM ON)
  endif()
endif()
