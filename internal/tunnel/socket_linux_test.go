// This file reads back what sockets were told.

package tunnel

import (
	"errors"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-proxy/caddy-holdfast/internal/sock"
)

// told is what a socket says about keep-alive (idle and interval in seconds) and
// the user timeout (in milliseconds).
type toldSocket struct{ on, idle, interval, count, timeout int }

func readBack(t *testing.T, conn any) (got toldSocket) {
	t.Helper()
	err := control(sock.Below(conn), func(fd int) error {
		var errs [5]error
		got.on, errs[0] = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE)
		got.idle, errs[1] = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)
		got.interval, errs[2] = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL)
		got.count, errs[3] = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT)
		got.timeout, errs[4] = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
		return errors.Join(errs[:]...)
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestSocketOptionsOfBothLegs(t *testing.T) {
	keep := net.KeepAliveConfig{Enable: true, Idle: 61 * time.Second, Interval: 13 * time.Second, Count: 7}
	for _, test := range []struct {
		name string
		set  SocketOptions
		want toldSocket
	}{
		{"both", SocketOptions{keep, 2500 * time.Millisecond}, toldSocket{1, 61, 13, 7, 2500}},
		{"keep-alive", SocketOptions{KeepAlive: keep}, toldSocket{1, 61, 13, 7, 0}},
		{"a fraction of a millisecond is one", SocketOptions{keep, time.Microsecond}, toldSocket{1, 61, 13, 7, 1}},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, client := tcpPair(t)
			b, backend := tcpPair(t)
			r := start(t, Settings{Sockets: test.set}, embeds{a}, b, "early")
			wantText(t, backend, "early")
			send(t, backend, "x")
			wantText(t, client, "x")
			for _, c := range []net.Conn{a, b} {
				await(t, "the socket told", func() bool { return readBack(t, c) == test.want })
			}
			r.change(Settings{Sockets: SocketOptions{UserTimeout: time.Second}})
			for _, c := range []net.Conn{a, b} {
				await(t, "keep-alive off and a timeout after a reload", func() bool {
					got := readBack(t, c)
					return got.on == 0 && got.timeout == 1000
				})
			}
		})
	}
}

func TestSocketOptionsWithoutTCP(t *testing.T) {
	o := SocketOptions{KeepAlive: net.KeepAliveConfig{Enable: true}, UserTimeout: time.Second}
	u, _ := unixPair(t)
	p, _ := net.Pipe()
	for _, c := range []any{u, p, &opaque{u}, nil} {
		if err := o.Apply(c); err != nil {
			t.Errorf("%T: got %v, want nothing to set", c, err)
		}
	}
	tcp, _ := tcpPair(t)
	_ = tcp.Close()
	if err := o.Apply(tcp); err == nil {
		t.Error("got no error for a closed socket, want one")
	}
}
