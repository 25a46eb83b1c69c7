# How tests, examples and benchmarks are compiled: they link moe_developer, which is never exported.

add_library(moe_developer INTERFACE)
target_link_libraries(moe_developer INTERFACE moe::moe)
target_compile_options(moe_developer INTERFACE
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion)

# GCC takes for a fault what Eigen and its own AVX-512 intrinsics leave uninitialised on purpose.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  target_compile_options(moe_developer INTERFACE -Wno-maybe-uninitialized)
  if(MOE_NATIVE)
    target_compile_options(moe_developer INTERFACE -Wno-uninitialized)
  endif()
endif()

# Clang tells of what is marked unused and used all the same, as functions of Eigen are. Examples hand
# formats on.
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  target_compile_options(moe_developer INTERFACE
    -Wused-but-marked-unused -Wformat=2 -Wno-format-nonliteral)
endif()

if(MOE_WARNINGS_AS_ERRORS)
  target_compile_options(moe_developer INTERFACE -Werror)
endif()

if(MOE_NATIVE)
  # Older clang for Apple silicon knows the other spelling alone.
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-march=native MOE_HAS_MARCH_NATIVE)
  if(MOE_HAS_MARCH_NATIVE)
    target_compile_options(moe_developer INTERFACE -march=native)
  else()
    target_compile_options(moe_developer INTERFACE -mcpu=native)
  endif()
endif()

if(MOE_SANITIZE)
  # float-cast-overflow is no part of "undefined", and finds a NaN on its way to become an index.
  set(sanitizers -fsanitize=address,undefined,float-cast-overflow)
  # AddressSanitizer finds what null and object-size look for, and only SharedBatch is virtual, for
  # vptr. The three together are a quarter of the time of compiling.
  set(left_out null,object-size,vptr)
  # g++ has no such list, and needs none: its pointer-overflow lets an offset to a null pointer pass.
  set(ignored)
  if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    set(ignored "-fsanitize-ignorelist=${CMAKE_CURRENT_LIST_DIR}/ignored_by_sanitizers.txt")
  endif()
  target_compile_options(moe_developer INTERFACE
    ${sanitizers} -fno-sanitize=${left_out} ${ignored}
    -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(moe_developer INTERFACE ${sanitizers})
  # The instrumented objects are large, and lld links them faster than ld.
  include(CheckLinkerFlag)
  check_linker_flag(CXX -fuse-ld=lld MOE_HAS_LLD)
  if(MOE_HAS_LLD)
    target_link_options(moe_developer INTERFACE -fuse-ld=lld)
  endif()
endif()
