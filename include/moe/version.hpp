#pragma once

/// @file
/// The version of the library, in the parts of semantic versioning. This is the one place it is
/// written: the build reads it from here.

#define MOE_VERSION_MAJOR 0
#define MOE_VERSION_MINOR 1
#define MOE_VERSION_PATCH 0
