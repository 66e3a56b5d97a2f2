/*
 * modex: a PMIx client and nothing else, in the words of PMIx an exchange ("modex"): each rank publishes a number, all
 * wait for each other, and each gets the numbers of all. Rank 0 prints what came out. MPI_Init does the same first.
 *
 * Compiled with the PMIx of each image: it shows which client meets which server (docs/mpi-matrix.md).
 */
#include <pmix.h>
#include <stdio.h>

#define KEY "enclos.number"

static uint32_t number_of(uint32_t rank)
{
	return 1000 + rank * 7;
}

static int complain(const char *what, pmix_status_t status)
{
	fprintf(stderr, "modex: %s: %s\n", what, PMIx_Error_string(status));
	return 1;
}

static pmix_status_t publish(const pmix_proc_t *me)
{
	pmix_value_t value;
	pmix_status_t status;

	value.type = PMIX_UINT32;
	value.data.uint32 = number_of(me->rank);
	status = PMIx_Put(PMIX_GLOBAL, KEY, &value);
	return status == PMIX_SUCCESS ? PMIx_Commit() : status;
}

static pmix_status_t wait_for_all(void)
{
	pmix_info_t info;
	bool collect = true;

	PMIX_INFO_LOAD(&info, PMIX_COLLECT_DATA, &collect, PMIX_BOOL);
	return PMIx_Fence(NULL, 0, &info, 1);
}

static pmix_status_t get_number(const pmix_proc_t *of, const char *key, uint32_t *number)
{
	pmix_value_t *value = NULL;
	pmix_status_t status = PMIx_Get(of, key, NULL, 0, &value);

	if (status != PMIX_SUCCESS)
		return status;
	if (value->type != PMIX_UINT32)
		return PMIX_ERR_TYPE_MISMATCH;
	*number = value->data.uint32;
	PMIX_VALUE_RELEASE(value);
	return PMIX_SUCCESS;
}

int main(void)
{
	pmix_proc_t me, other;
	uint32_t size = 0, number = 0;
	pmix_status_t status = PMIx_Init(&me, NULL, 0);

	if (status != PMIX_SUCCESS)
		return complain("PMIx_Init", status);
	PMIX_LOAD_PROCID(&other, me.nspace, PMIX_RANK_WILDCARD);
	if ((status = get_number(&other, PMIX_JOB_SIZE, &size)) != PMIX_SUCCESS)
		return complain("size of the job", status);
	if ((status = publish(&me)) != PMIX_SUCCESS)
		return complain("PMIx_Put", status);
	if ((status = wait_for_all()) != PMIX_SUCCESS)
		return complain("PMIx_Fence", status);
	for (uint32_t rank = 0; rank < size; rank++) {
		other.rank = rank;
		if ((status = get_number(&other, KEY, &number)) != PMIX_SUCCESS)
			return complain("PMIx_Get", status);
		if (number != number_of(rank)) {
			fprintf(stderr, "modex: rank %u published another number\n", rank);
			return 1;
		}
	}
	if (me.rank == 0)
		printf("modex of %u: all data right\n", size);
	status = PMIx_Finalize(NULL, 0);
	return status == PMIX_SUCCESS ? 0 : complain("PMIx_Finalize", status);
}
