/* Single rows of packed codes, for all C files here; see packed.c. */

#ifndef QATC_PACKED_H
#define QATC_PACKED_H

#include <stdint.h>

#define HIDDEN __attribute__((visibility("hidden")))

/* The sum of code * x over a row of `width` codes of 2 to 8 bits; x is padded to 8 with zeros. */
HIDDEN int32_t dot_row(const uint8_t *w, const int8_t *x, int64_t width, int bits, int32_t x_sum);

/* The codes of one packed row of 2 to 7 bits, as int8 [width]. */
HIDDEN void unpack_row(const uint8_t *restrict plane, int8_t *restrict row, int64_t width,
                       int bits);

#endif
