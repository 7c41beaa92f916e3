// This file makes headers of the PROXY protocol.

package transport

import (
	"net"

	"github.com/pires/go-proxyproto"
)

// proxyVersions are the values of proxy_protocol; empty sends no header.
var proxyVersions = map[string]byte{"": 0, "v1": 1, "v2": 2}

// header returns the PROXY header of a connection, or nil if there is to be none.
func (d *Dialer) header(r Request) ([]byte, error) {
	if d.proxy == 0 {
		return nil, nil
	}
	// Both addresses must be of one family. As the client's destination cannot be
	// known behind other proxies, it is unspecified, as with reverse_proxy.
	var from, to net.Addr
	if client := r.Client.Addr().Unmap(); client.IsValid() {
		to = &net.TCPAddr{IP: net.IPv6zero}
		if client.Is4() {
			to = &net.TCPAddr{IP: net.IPv4zero}
		}
		from = &net.TCPAddr{IP: client.AsSlice(), Port: int(r.Client.Port())}
	}
	header := proxyproto.HeaderProxyFromAddrs(d.proxy, from, to) // without addresses: LOCAL, or UNKNOWN
	if err := header.SetTLVs(r.TLVs); err != nil {
		return nil, err
	}
	return header.Format()
}
