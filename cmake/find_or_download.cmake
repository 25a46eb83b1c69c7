# moe_find_or_download(<name> LOWEST <version> URL <archive> SHA256 <hash> PACKAGES <names>
#                      [FIND <arguments>...] [HEADERS_ONLY])
#
# Takes the system's package where there is one, else the archive. LOWEST is the oldest version that
# will do, PACKAGES names the package in the error message, and FIND goes to find_package().
#
# LOWEST is checked after the search, since the version files of Eigen and Catch2 refuse every other
# major version, and newer ones are welcome.
#
# A library of headers needs no build of its own: with HEADERS_ONLY its archive is unpacked, and its
# CMakeLists.txt with all its options and targets left alone.

# Downloads the archive in one try: FetchContent makes several, which takes a minute and a half, and
# says of a failure neither which package it was nor what to do.
function(moe_download name archive url sha256 packages lowest)
  if(EXISTS "${archive}")
    return()
  endif()
  message(STATUS "moe: downloading ${name}")
  # A small file tells whether the server can be reached: while a connection is being made, nothing but
  # the time limit ends the wait, and an archive needs a long one. An HTTP error (22) is an answer too.
  string(REGEX MATCH "^https://[^/]+/" server "${url}")
  file(DOWNLOAD "${server}robots.txt" TIMEOUT 8 STATUS status)
  list(POP_FRONT status failed)
  if(failed EQUAL 0 OR failed EQUAL 22)
    file(DOWNLOAD "${url}" "${archive}.part" TIMEOUT 300 INACTIVITY_TIMEOUT 10 STATUS status)
    list(POP_FRONT status failed)
  endif()
  list(JOIN status " " reason)
  if(NOT failed)
    file(SHA256 "${archive}.part" found)
    if(NOT found STREQUAL sha256)
      set(failed TRUE)
      set(reason "what came has another hash, ${found}")
    endif()
  endif()
  if(failed)
    file(REMOVE "${archive}.part")
    string(TOUPPER ${name} upper)
    message(FATAL_ERROR
      "moe needs ${name} ${lowest} or newer. It was not found on this system, and it could not be "
      "downloaded: ${reason} (${url}). Any of these helps:\n"
      "  install its package: ${packages}\n"
      "  -D${name}_DIR=<the folder with ${name}Config.cmake>\n"
      "  -DFETCHCONTENT_SOURCE_DIR_${upper}=<a folder with its sources>\n")
  endif()
  file(RENAME "${archive}.part" "${archive}")
endfunction()

# A macro, since find_package() and FetchContent leave variables where they are called.
macro(moe_find_or_download name)
  cmake_parse_arguments(moe_need "HEADERS_ONLY" "LOWEST;URL;SHA256;PACKAGES" "FIND" ${ARGN})
  string(TOUPPER ${name} moe_need_upper)
  string(TOLOWER ${name} moe_need_lower)

  unset(${name}_FOUND)
  if(NOT FETCHCONTENT_SOURCE_DIR_${moe_need_upper})
    find_package(${name} ${moe_need_FIND} CONFIG QUIET)
  endif()
  if(${name}_FOUND AND "${${name}_VERSION}" VERSION_LESS moe_need_LOWEST)
    message(FATAL_ERROR
      "moe needs ${name} ${moe_need_LOWEST} or newer, but ${${name}_DIR} is ${${name}_VERSION}. "
      "Install a newer one, or download it with -DCMAKE_DISABLE_FIND_PACKAGE_${name}=ON.")
  endif()

  if(NOT ${name}_FOUND)
    include(FetchContent)
    get_filename_component(moe_need_archive "${moe_need_URL}" NAME)
    set(moe_need_archive "${FETCHCONTENT_BASE_DIR}/${moe_need_lower}-archive/${moe_need_archive}")
    # A project around this one may have said where to take it from, and then what is declared here
    # is ignored.
    get_property(moe_need_declared GLOBAL
      PROPERTY _FetchContent_${moe_need_lower}_savedDetails DEFINED)
    if(NOT (moe_need_declared OR FETCHCONTENT_FULLY_DISCONNECTED OR
            FETCHCONTENT_SOURCE_DIR_${moe_need_upper}))
      moe_download(${name} "${moe_need_archive}" "${moe_need_URL}" "${moe_need_SHA256}"
                   "${moe_need_PACKAGES}" "${moe_need_LOWEST}")
    endif()
    set(moe_need_subdirectory)
    if(moe_need_HEADERS_ONLY)
      set(moe_need_subdirectory SOURCE_SUBDIR headers-only)  # which does not exist
    endif()
    FetchContent_Declare(${name} URL "${moe_need_archive}" URL_HASH SHA256=${moe_need_SHA256}
                         ${moe_need_subdirectory})
    FetchContent_MakeAvailable(${name})
  endif()
endmacro()

function(moe_add_headers target folder)
  if(NOT TARGET ${target})
    add_library(${target} INTERFACE IMPORTED GLOBAL)
    set_target_properties(${target} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${folder}")
  endif()
endfunction()
