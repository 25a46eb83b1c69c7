#pragma once

/// \file
/// The version of the library, in the parts of semantic versioning. This is the one place it is
/// written: the build reads it from here.

/// The major version, which changes with incompatible changes.
#define MOE_VERSION_MAJOR 0
/// The minor version, which changes with new features.
#define MOE_VERSION_MINOR 2
/// The patch version, which changes with corrections.
#define MOE_VERSION_PATCH 0
