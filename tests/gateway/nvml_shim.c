/* Stands in for NVIDIA's driver in tests: libnvidia-ml.so.1 as pynvml loads it, and a tool that hears NVTX ranges.
 *
 * Readings come from the file $NVML_SHIM, read anew at each call, one "name value" a line; what is not in it has
 * a default. Names: count, init (an NVML error code), lost_after (calls until all GPUs are lost), and for each device
 * handle_0, energy_0, energy_error_0, utilisation_0, utilisation_error_0. NVTX ranges are written to the file $NVTX_SHIM.
 *
 * Compiled with -DWITHOUT_ENERGY, the energy function is missing, as in a driver of before Volta.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, GPU_IS_LOST = 15 };

static int started;
static long long calls;
static char devices[8]; /* a handle is the address of one of these */

static long long setting(const char *name, long long otherwise) {
    const char *path = getenv("NVML_SHIM");
    FILE *file = path ? fopen(path, "r") : NULL;
    char found[64];
    unsigned long long value;
    long long result = otherwise;
    while (file && fscanf(file, "%63s %llu", found, &value) == 2)
        if (!strcmp(found, name)) result = (long long)value;
    if (file) fclose(file);
    return result;
}

static long long of_device(const char *name, void *device, long long otherwise) {
    char full[64];
    snprintf(full, sizeof full, "%s_%d", name, (int)((char *)device - devices));
    return setting(full, otherwise);
}

/* The error of a call about a device: lost after so many calls, or the one asked for. */
static int error_of(const char *name, void *device) {
    if (!started) return UNINITIALIZED;
    if (calls++ >= setting("lost_after", 1LL << 60)) return GPU_IS_LOST;
    return (int)of_device(name, device, SUCCESS);
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    int error = (int)setting("init", SUCCESS);
    started += error == SUCCESS;
    return error;
}

int nvmlShutdown(void) {
    if (!started) return UNINITIALIZED;
    started--;
    return SUCCESS;
}

int nvmlSystemGetDriverVersion(char *text, unsigned length) {
    snprintf(text, length, "535.104.05");
    return started ? SUCCESS : UNINITIALIZED;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = (unsigned)setting("count", 2);
    return started ? SUCCESS : UNINITIALIZED;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if (index >= sizeof devices) return INVALID_ARGUMENT;
    *device = devices + index;
    return error_of("handle", *device);
}

int nvmlDeviceGetUUID(void *device, char *text, unsigned length) {
    snprintf(text, length, "GPU-00000000-0000-0000-0000-00000000000%d", (int)((char *)device - devices));
    return error_of("uuid", device);
}

#ifndef WITHOUT_ENERGY
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    *millijoules = (unsigned long long)of_device("energy", device, 1000);
    return error_of("energy_error", device);
}
#endif

int nvmlDeviceGetUtilizationRates(void *device, unsigned *rates) {
    rates[0] = (unsigned)of_device("utilisation", device, 50);
    rates[1] = 0;
    return error_of("utilisation_error", device);
}

const char *nvmlErrorString(int error) {
    (void)error;
    return "an error of the shim";
}

/* NVTX: a tool exports InitializeInjectionNvtx2 and puts its functions into a table of the program's. */
typedef struct {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    uint64_t payload;
    int32_t message_type;
    const char *message; /* a registered string: what register_string gave */
} attributes_t;
typedef struct {
    size_t size;
    int (*function_table)(int module, void ***(*table), unsigned *length);
} callbacks_t;

static void note(const char *what, const char *domain, const char *name) {
    FILE *file = fopen(getenv("NVTX_SHIM"), "a");
    if (file) {
        fprintf(file, "%s %s %s\n", what, domain, name);
        fclose(file);
    }
}

static void *create_domain(const char *name) { return strdup(name); }
static void *register_string(void *domain, const char *text) { return (void)domain, strdup(text); }
static uint64_t start_range(void *domain, const attributes_t *range) {
    note("start", domain, range->message);
    return (uint64_t)(uintptr_t)range->message;
}
static void end_range(void *domain, uint64_t range) { note("end", domain, (const char *)(uintptr_t)range); }

int InitializeInjectionNvtx2(const void *(*export_table)(uint32_t id)) {
    enum { CALLBACKS = 1, CORE2 = 5, RANGE_START = 2, RANGE_END = 3, REGISTER_STRING = 10, CREATE_DOMAIN = 12 };
    const callbacks_t *callbacks = export_table(CALLBACKS);
    void ***table;
    unsigned length;
    if (!callbacks || !callbacks->function_table(CORE2, &table, &length)) return 0;
    *table[RANGE_START] = (void *)start_range;
    *table[RANGE_END] = (void *)end_range;
    *table[REGISTER_STRING] = (void *)register_string;
    *table[CREATE_DOMAIN] = (void *)create_domain;
    return 1;
}
