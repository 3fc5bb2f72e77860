package stack

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
)

// Agents and sandboxes get their ports from blocks below the range that Linux uses for
// outgoing connections. So no outgoing connection can take a port after it was found free
// and before it is used.
const (
	firstBlock = 10_000
	blockSize  = 1_000
	blocks     = 22
	agentPorts = 100 // the rest of a block is for sandboxes
)

// portBlock is a range of ports that no other portBlock of any process on this machine has.
type portBlock struct {
	base int
	next int
	lock net.Listener // on the base port; it ends with the process, however that ends
}

func newPortBlock() (*portBlock, error) {
	for _, i := range rand.Perm(blocks) {
		base := firstBlock + i*blockSize
		if lock, err := listen(base); err == nil {
			return &portBlock{base: base, next: base + 1, lock: lock}, nil
		}
	}
	return nil, errors.New("all blocks of ports are taken")
}

// port returns the block's next free port.
func (b *portBlock) port() (int, error) {
	for ; b.next < b.base+agentPorts; b.next++ {
		if l, err := listen(b.next); err == nil {
			b.next++
			return b.next - 1, l.Close()
		}
	}
	return 0, fmt.Errorf("no free port from %d on", b.base)
}

// sandboxPorts returns the first and last port of the i-th of n equal parts of the ports for
// sandboxes.
func (b *portBlock) sandboxPorts(i, n int) (first, last int) {
	size := (blockSize - agentPorts) / n
	first = b.base + agentPorts + i*size
	return first, first + size - 1
}

func (b *portBlock) release() error { return b.lock.Close() }

// FreePort returns preferred if nobody listens on it on loopback, and otherwise another free
// port. It does not reserve the port.
func FreePort(preferred int) (int, error) {
	l, err := listen(preferred)
	if err != nil {
		l, err = listen(0)
	}
	if err != nil {
		return 0, err
	}
	return portOf(l), l.Close()
}

func portOf(l net.Listener) int { return l.Addr().(*net.TCPAddr).Port }

func listen(port int) (net.Listener, error) {
	return net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
}
