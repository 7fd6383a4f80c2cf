/* What an op reports. bind/ alone turns it into an exception. */
#ifndef NF_STATUS_H
#define NF_STATUS_H

typedef enum {
    NF_OK,
    NF_NO_MEMORY, /* no room for a workspace */
} nf_status;

#endif
