package sock

import (
	"net"
	"testing"
)

// knowing is a connection that knows about itself, over one that has a socket.
type knowing struct {
	net.Conn
	info  Info
	known bool
}

func (k *knowing) SockInfo() (Info, bool) { return k.info, k.known }

// An Asker answers for itself, whatever is below it; one below another wrapper is
// not asked: only what is handed in says that it knows.
func TestAskerAnswersForItself(t *testing.T) {
	near, far := net.Pipe()
	t.Cleanup(func() { _, _ = near.Close(), far.Close() })
	want := Info{Reset: true, Finished: true, Unread: 3, Unacked: 6, Unsent: 5, Acked: 7}
	if got, known := Ask(&knowing{near, want, true}); !known || got != want {
		t.Errorf("got %+v, known %t, want %+v", got, known, want)
	}
	if got, known := Ask(&knowing{Conn: near}); known || got != (Info{}) {
		t.Errorf("got %+v, known %t, want nothing known", got, known)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	tcp, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tcp.Close() })
	if got, known := Ask(&knowing{tcp, want, true}); !known || got != want {
		t.Errorf("over a socket: got %+v, known %t, want what it says itself", got, known)
	}
	if _, known := Ask(&knowing{Conn: tcp}); known {
		t.Error("over a socket: got it known, want what it says itself")
	}
}
