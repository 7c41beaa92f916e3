// This file holds how the kernel finds peers that are not there any more.

package tunnel

import (
	"net"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/sock"
)

// SocketOptions are what the kernel is told about a TCP connection.
type SocketOptions struct {
	// KeepAlive finds peers that have vanished while nothing is to be sent. Without
	// Enable there is no keep-alive; a negative value leaves what is set.
	KeepAlive net.KeepAliveConfig
	// UserTimeout is how long sent bytes may stay without an acknowledgement, or
	// unsent because the peer does not read. Zero is the system's patience, about
	// a quarter of an hour for the former and no end for the latter. Linux only.
	UserTimeout time.Duration
}

// Apply sets the options of the TCP socket below conn. Where there is none there
// is nothing to set.
func (o SocketOptions) Apply(conn any) error {
	socket := sock.Below(conn)
	tcp, ok := socket.(interface {
		SetKeepAliveConfig(config net.KeepAliveConfig) error
	})
	if !ok {
		return nil
	}
	k := o.KeepAlive
	if !k.Enable {
		k = net.KeepAliveConfig{Idle: -1, Interval: -1, Count: -1}
	}
	if err := tcp.SetKeepAliveConfig(k); err != nil {
		return err
	}
	return setUserTimeout(socket, o.UserTimeout)
}
