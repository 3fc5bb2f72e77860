// Command million measures Bivouac with a million sessions beside Bivouac with a hundred,
// in one run on one machine.
//
// It fills a real Consul with records, two prefixes with different numbers of them, and
// runs a replica on each. The sandboxes are those of a model driver, which runs as a
// plugin, so that its memory is not that of the replica. The model calculates the
// sandboxes that stand from the start and keeps none of them.
//
// The memory of the Nomad driver has a row of its own. For that the driver follows a Nomad
// that does not exist either, in the process of this command.
//
// Throughout the run a probe writes a key to Consul every 5 ms. The table shows for each
// measurement the longest time that such a write took meanwhile.
//
// The command prints a table, with the targets that were missed. It needs Linux's /proc.
// It starts its own servers, whose data are in a temporary folder that it removes.
package main
