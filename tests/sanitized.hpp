#pragma once

/// \file
/// MOE_TEST_SANITIZED is defined where AddressSanitizer, of g++ or of clang, has malloc's place.

#if defined(__SANITIZE_ADDRESS__)
#define MOE_TEST_SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MOE_TEST_SANITIZED
#endif
#endif
